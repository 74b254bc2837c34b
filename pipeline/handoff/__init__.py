# SPDX-License-Identifier: Apache-2.0
"""A bundle laid out for one consumer, with the consumer's own code, and a check that runs it on the golden samples."""
