# SPDX-License-Identifier: Apache-2.0
"""Token by token: decoding with a cache over the graph of a causal language model or an encoder-decoder."""
