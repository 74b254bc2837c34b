# SPDX-License-Identifier: Apache-2.0
"""No test may reach the network, colour its output, or depend on the width of somebody's terminal.

Set before anything is imported: huggingface_hub reads its switches once.
"""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    NO_COLOR="1",
    COLUMNS="120",
)
for name in ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE"):
    os.environ.pop(name, None)
