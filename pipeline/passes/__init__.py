# SPDX-License-Identifier: Apache-2.0
"""Graph passes, one a file; see `base` for the contract."""
