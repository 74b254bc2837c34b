# SPDX-License-Identifier: Apache-2.0
"""Statistics of a model's activations on calibration data: what every quantizer and every pruner decides from."""

from .calibration import Calibration
from .histogram import Histogram
from .results import Channels, Gram, Range, Statistics, Wanted

__all__ = ["Calibration", "Channels", "Gram", "Histogram", "Range", "Statistics", "Wanted"]
