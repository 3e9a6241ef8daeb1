"""Record what the loaders of `integrations/vllm` and `integrations/sglang` use of the engines.

    python -m pip download --no-deps vllm sglang -d WHEELS
    python tests/integrations/engines/record.py WHEELS/vllm-*.whl WHEELS/sglang-*.whl

Reads the sources in the wheels, and runs none of them: an engine needs a GPU's packages. Writes one
JSON file for each beside this one: version, bases of classes, and signatures.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

WANTED = {
    "vllm": {
        "vllm/plugins/__init__.py": ["DEFAULT_PLUGINS_GROUP"],
        "vllm/model_executor/model_loader/__init__.py": [
            "register_model_loader", "get_model_loader",
        ],
        "vllm/model_executor/model_loader/base_loader.py": [
            "BaseModelLoader", "BaseModelLoader.__init__", "BaseModelLoader.download_model",
            "BaseModelLoader.load_weights", "BaseModelLoader.load_model",
        ],
        "vllm/model_executor/model_loader/default_loader.py": [
            "DefaultModelLoader", "DefaultModelLoader.__init__",
            "DefaultModelLoader.download_model", "DefaultModelLoader.get_all_weights",
            "DefaultModelLoader.load_weights", "DefaultModelLoader.counter_before_loading_weights",
        ],
        "vllm/config/vllm.py": ["get_current_vllm_config_or_none"],
        "vllm/config/load.py": ["LoadConfig.load_format", "LoadConfig.download_dir"],
        "vllm/model_executor/layers/linear.py": ["LinearBase", "UnquantizedLinearMethod"],
        "vllm/model_executor/layers/quantization/__init__.py": ["register_quantization_config"],
        "vllm/model_executor/layers/quantization/base_config.py": [
            "QuantizationConfig", "QuantizationConfig.__init__", "QuantizationConfig.get_name",
            "QuantizationConfig.get_supported_act_dtypes", "QuantizationConfig.get_min_capability",
            "QuantizationConfig.get_config_filenames", "QuantizationConfig.from_config",
            "QuantizationConfig.get_quant_method",
        ],
    },
    "sglang": {
        "sglang/srt/plugins/__init__.py": ["GENERAL_PLUGINS_GROUP"],
        "sglang/srt/plugins/hook_registry.py": [
            "HookRegistry", "HookRegistry.register", "HookType.AROUND",
        ],
        "sglang/srt/model_loader/loader.py": [
            "get_model_loader", "BaseModelLoader", "BaseModelLoader.__init__",
            "BaseModelLoader.download_model", "BaseModelLoader.load_model", "DefaultModelLoader",
            "DefaultModelLoader.__init__", "DefaultModelLoader.download_model",
            "DefaultModelLoader.load_model", "DefaultModelLoader._get_all_weights",
            "DefaultModelLoader._get_weights_iterator",
            "DefaultModelLoader.Source", "DefaultModelLoader.Source.init_new",
            "DefaultModelLoader.Source.model_or_path", "DefaultModelLoader.Source.revision",
            "DefaultModelLoader.Source.prefix",
        ],
        "sglang/srt/configs/load_config.py": [
            "LoadConfig.load_format", "LoadConfig.download_dir", "LoadConfig.draft_model_idx",
            "LoadFormat.AUTO", "LoadFormat.SAFETENSORS", "LoadFormat.DUMMY",
        ],
        "sglang/srt/layers/linear.py": ["LinearBase"],
        "sglang/srt/layers/quantization/unquant.py": ["UnquantizedLinearMethod"],
        "sglang/srt/layers/quantization/__init__.py": ["QUANTIZATION_METHODS"],
        "sglang/srt/layers/quantization/base_config.py": [
            "QuantizationConfig", "QuantizationConfig.__init__", "QuantizationConfig.get_name",
            "QuantizationConfig.get_supported_act_dtypes", "QuantizationConfig.get_min_capability",
            "QuantizationConfig.get_config_filenames", "QuantizationConfig.from_config",
            "QuantizationConfig.get_quant_method", "QuantizationConfig.get_scaled_act_names",
        ],
    },
}  # fmt: skip
"""By package and file: names, dotted below the file."""


def record(wheel: Path) -> tuple[str, dict[str, object]]:
    """The package and what is recorded of it. Raises KeyError for a name that is not there."""
    package, version = wheel.name.split("-")[:2]
    found: dict[str, dict[str, str]] = {}
    abstract: dict[str, list[str]] = {}
    with zipfile.ZipFile(wheel) as files:
        for file, names in WANTED[package].items():
            tree = ast.parse(files.read(file).decode())
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found[module] = {name: _said(_find(tree, name, file)) for name in names}
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name in names:
                    methods = [
                        inner.name for inner in node.body
                        if isinstance(inner, ast.FunctionDef)
                        and any(ast.unparse(d) == "abstractmethod" for d in inner.decorator_list)
                    ]  # fmt: skip
                    if methods:
                        abstract[f"{module}.{node.name}"] = methods
    return package, {"package": package, "version": version, "names": found, "abstract": abstract}


def _find(tree: ast.Module, dotted: str, file: str) -> ast.stmt:
    body: list[ast.stmt] = tree.body
    node: ast.stmt | None = None
    for name in dotted.split("."):
        node = next((n for n in body if name in _names(n)), None)
        if node is None:
            raise KeyError(f"{file}: no {dotted!r}; the engine has changed")
        body = getattr(node, "body", [])
    assert node is not None
    return node


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return []


def _said(node: ast.stmt) -> str:
    """Bases of a class, signature of a function, value of anything else."""
    if isinstance(node, ast.ClassDef):
        return f"class({', '.join(ast.unparse(base) for base in node.bases)})"
    if isinstance(node, ast.FunctionDef):
        decorators = "".join(f"@{ast.unparse(d)} " for d in node.decorator_list)
        return f"{decorators}({ast.unparse(node.args)})"
    value = getattr(node, "value", None)
    return "" if value is None else ast.unparse(value)


def main() -> None:
    for path in sys.argv[1:]:
        package, recorded = record(Path(path))
        out = Path(__file__).with_name(f"{package}.json")
        out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
