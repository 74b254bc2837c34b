# SPDX-License-Identifier: Apache-2.0
"""The built-in recipes, as YAML files."""
