"""Run by `gguf_cases.convert`: llama.cpp's own conversion, of models that have no tokenizer.

python gguf_convert.py LLAMA.CPP TYPE FOLDER FILE [FOLDER FILE ...]
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main(root: str, kind: str, *pairs: str) -> None:
    sys.path[:0] = [root, str(Path(root) / "gguf-py")]  # its own gguf, which may know more
    import gguf
    import torch

    conversion: Any = import_module("conversion")

    def no_vocabulary(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    types = gguf.LlamaFileType
    for folder, file in zip(pairs[::2], pairs[1::2], strict=True):
        config = conversion.ModelBase.load_hparams(Path(folder), False)
        kind_of = conversion.get_model_architecture(config, conversion.ModelType.TEXT)
        found = conversion.get_model_class(kind_of)
        found.set_vocab = no_vocabulary
        found.no_mtp = True
        output = {"bf16": types.MOSTLY_BF16, "f32": types.ALL_F32}[kind]
        with torch.inference_mode():
            found(Path(folder), output, Path(file), model_name="tiny").write()


if __name__ == "__main__":
    main(*sys.argv[1:])
