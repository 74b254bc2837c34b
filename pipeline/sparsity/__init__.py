# SPDX-License-Identifier: Apache-2.0
"""Which single weights go, and what those that stay make up for, in numpy alone."""
