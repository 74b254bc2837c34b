# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/int8_peers.py` is made of: models, data, and other people's quantizers."""
