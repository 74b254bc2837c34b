# SPDX-License-Identifier: Apache-2.0
"""From a source to a validated, measured bundle: recipes, passes, gates, the command line."""
