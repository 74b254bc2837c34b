# SPDX-License-Identifier: Apache-2.0
"""The server of bundles: Open Inference Protocol v2, plain JSON by task, dynamic batches, live figures."""
