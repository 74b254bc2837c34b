# SPDX-License-Identifier: Apache-2.0
"""Continue a text: python generate.py "Once upon a time" """

import sys
from pathlib import Path


def main() -> None:
    import onnxruntime_genai as og

    model = og.Model(str(Path(__file__).parent))
    tokenizer = og.Tokenizer(model)
    printed = tokenizer.create_stream()
    prompt = tokenizer.encode(sys.argv[1] if len(sys.argv) > 1 else "Once upon a time")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 64)  # the cache is made this long
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
        sys.stdout.write(printed.decode(generator.get_next_tokens()[0]))
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
