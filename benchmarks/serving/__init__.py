# SPDX-License-Identifier: Apache-2.0
"""The server under load: beside other servers, over a long time, and with requests that nobody would send."""
