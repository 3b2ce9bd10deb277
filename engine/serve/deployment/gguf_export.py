"""A model as a GGUF file for llama.cpp: GPT-2 and Llama form, with a byte-level BPE tokenizer.

Streamed: the header is planned from names and shapes, then one tensor after another is written. llama.cpp turns pairs
of neighbours by rotary positions where ours turns halves of a head, so rows of queries and keys are permuted; norms and
biases stay fp32, as its kernels want them. The tokenizer's splitter is named (`tokenizer.ggml.pre`), since llama.cpp
knows published ones by their hash alone; a splitter that it does not have is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.interchange.forms import GPT2, LLAMA, form_of
from engine.config.schema.model import ModelConfig
from engine.data.tokenizer.files import read_files
from engine.data.tokenizer.folder import load_tokenizer
from engine.data.tokenizer.plain_text import model_type
from engine.errors import CheckpointError, ConfigError
from engine.extras import need
from engine.models.families import family
from engine.parallel.sharding import ParameterSpec
from engine.serve.deployment.held_out_text import LossAgreement, compare_losses, held_out_text, logits_of
from engine.serve.new_folder import new_folder
from engine.serve.sample_text import TEXT
from engine.serve.source import Trained

FILE = "model.gguf"
_NAMES = {
    "embed_tokens": ("token_embd",),
    "embed_positions": ("position_embd",),
    "attention_norm": ("attn_norm",),
    "ffn_norm": ("ffn_norm",),
    "out_proj": ("attn_output",),
    "up_proj": ("ffn_up",),
    "gate_up_proj": ("ffn_gate", "ffn_up"),
    "down_proj": ("ffn_down",),
    "final_norm": ("output_norm",),
    "lm_head": ("output",),
}
_SPLITTERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": name
    for digits, name in (("{1,3}", "llama-bpe"), ("", "qwen2"))
}
"""Regular expressions of published splitters by llama.cpp's names (llama3 and Qwen2)."""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def export_gguf(trained: Trained, output: Path, dtype: str = "fp32") -> LossAgreement:
    """Write a folder with `model.gguf` and read it again: by llama.cpp where llama-cpp-python is there, else by
    transformers.

    Raises:
        EnvironmentProblem: a package is missing, or the folder cannot be written.
        ConfigError: the model or its tokenizer has no counterpart in llama.cpp, or `output` is taken.
        CheckpointError: the reader gives another loss than our own forward pass, or splits text otherwise.
    """
    gguf = need("gguf", "--to gguf", "deploy")
    _check_form(trained.config)
    vocabulary, text = _vocabulary(trained), held_out_text(trained)
    with new_folder(output) as partial:
        _write(gguf, trained, vocabulary, partial / FILE, dtype)
        return _read_back(trained, text, partial, dtype, output)


def _check_form(model: ModelConfig) -> None:
    form = form_of(model)
    if form not in (GPT2, LLAMA):
        raise ConfigError(
            f"--to gguf of a model in {form.name} form", "GPT-2 or Llama form", "use --to onnx or --to huggingface"
        )
    fields = form.their_config(model).to_dict()
    rope = (fields.get("rope_parameters") or {}).get("rope_type", "default")
    if rope != "default":
        raise ConfigError(f"--to gguf with rotary scaling ({rope})", "none", "use --to onnx or --to huggingface")


def _vocabulary(trained: Trained) -> dict[str, Any]:
    """Return tokens, types, merges and the splitter's name. Raises `ConfigError` where llama.cpp has no such."""
    if trained.tokenizer is None:
        raise ConfigError("--to gguf of a model without a tokenizer", "one with it", "name it with --tokenizer")
    files, tokenizer = read_files(trained.tokenizer), load_tokenizer(trained.tokenizer)
    tree = files.tree
    pre, size = _splitter(tree), trained.config.vocab_size
    if model_type(tree) != "BPE" or pre is None:
        raise ConfigError(
            f"--to gguf with the tokenizer in {trained.tokenizer}, which is {_described(tree)}",
            "byte-level BPE that splits as GPT-2, Llama 3 or Qwen2 does, and does not change text before",
            "use --to onnx or --to huggingface",
        )
    tokens = [f"[UNUSED{number}]" for number in range(size)]
    types = [_UNUSED] * size
    for name, number in tokenizer.model.get_vocab().items():
        tokens[number], types[number] = name, _NORMAL
    for added in tree.get("added_tokens") or []:
        types[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
    merges = [one if isinstance(one, str) else " ".join(one) for one in tree["model"]["merges"]]
    return {"tokens": tokens, "types": types, "merges": merges, "pre": pre, "end": tokenizer.eos_id}


def _splitter(tree: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of a tokenizer's splitter; None where it has none."""
    if tree.get("normalizer"):
        return None
    before = tree.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        plain = steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space")
        return "gpt-2" if plain and not tree["model"].get("ignore_merges") else None
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pre = _SPLITTERS.get(steps[0]["pattern"].get("Regex", ""))
        # Llama 3's name stands for the look-up of whole words, too.
        return pre if bool(tree["model"].get("ignore_merges")) == (pre == "llama-bpe") else None
    return None


def _described(tree: dict[str, Any]) -> str:
    steps = tree.get("pre_tokenizer") or {}
    kinds = [step.get("type") for step in steps.get("pretokenizers", [steps])]
    return f"{model_type(tree)} behind {' and '.join(map(str, kinds))}"


def _write(gguf: Any, trained: Trained, vocabulary: dict[str, Any], path: Path, dtype: str) -> None:
    model = trained.config
    writer = gguf.GGUFWriter(path, "gpt2" if form_of(model) is GPT2 else "llama")
    _write_settings(writer, trained, vocabulary, dtype)
    specs = {spec.name: spec for spec in family(model).specs(model)}
    for spec in specs.values():
        for name, shape in _tensors(model, spec).items():
            kind = _kind(gguf, shape, dtype)
            size = torch.Size(shape).numel() * (4 if kind == gguf.GGMLQuantizationType.F32 else 2)
            held = np.dtype("float32" if kind == gguf.GGMLQuantizationType.F32 else "float16")
            writer.add_tensor_info(name, shape, held, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for spec in specs.values():
        value = trained.source.read(spec.name, 0, spec.stored_shape[0])
        for block, shape in zip(_blocks(model, spec, value), _tensors(model, spec).values(), strict=True):
            writer.write_tensor_data(_stored(block, _kind(gguf, shape, dtype).name))
    writer.close()


def _write_settings(writer: Any, trained: Trained, vocabulary: dict[str, Any], dtype: str) -> None:
    model = trained.config
    writer.add_name(trained.run.name if trained.run else "palimpsest")
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.feed_forward_size)
    writer.add_head_count(model.num_heads)
    writer.add_file_type({"fp32": 0, "fp16": 1, "bf16": 32}[dtype])
    writer.add_vocab_size(model.vocab_size)
    if form_of(model) is GPT2:
        writer.add_layer_norm_eps(model.norm_epsilon)
    else:
        writer.add_head_count_kv(model.num_kv_heads)
        writer.add_layer_norm_rms_eps(model.norm_epsilon)
        rotary = model.rotary(None)
        assert rotary is not None, "Llama form"
        writer.add_rope_freq_base(rotary.theta)
        for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
            add(model.head_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    # rows of training have nothing in front of a text
    writer.add_bos_token_id(vocabulary["end"])
    writer.add_eos_token_id(vocabulary["end"])
    writer.add_add_bos_token(False)


def _tensors(model: ModelConfig, spec: ParameterSpec) -> dict[str, tuple[int, ...]]:
    """Return the tensors of llama.cpp that one of our parameters becomes, with their shapes."""
    module, _, role = spec.name.rpartition(".")
    part = module.rpartition(".")[2]
    if part == "qkv_proj":
        names = ("attn_qkv",) if form_of(model) is GPT2 else ("attn_q", "attn_k", "attn_v")
    else:
        names = _NAMES[part]
    layer = f"blk.{module.split('.')[1]}." if module.startswith("layers.") else ""
    rows = spec.blocks() if len(names) > 1 else (spec.stored_shape[0],)
    return {f"{layer}{name}.{role}": (count, *spec.stored_shape[1:]) for name, count in zip(names, rows, strict=True)}


def _blocks(model: ModelConfig, spec: ParameterSpec, value: torch.Tensor) -> list[torch.Tensor]:
    shapes = _tensors(model, spec)
    blocks = list(value.split([shape[0] for shape in shapes.values()]))
    turned = [name.rpartition(".")[0].endswith(("attn_q", "attn_k")) for name in shapes]
    return [_permuted(block, model.head_size) if turns else block for block, turns in zip(blocks, turned, strict=True)]


def _permuted(value: torch.Tensor, head_size: int) -> torch.Tensor:
    """Return rows of queries or keys with the halves of each head interleaved.

    A head of 4: our rows 0 1 2 3 turn the pairs (0, 2) and (1, 3); llama.cpp's turn neighbours, hence 0 2 1 3.
    """
    # (heads, 2, half, ...) -> (heads, half, 2, ...)
    return value.view(-1, 2, head_size // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _kind(gguf: Any, shape: tuple[int, ...], dtype: str) -> Any:
    kinds = gguf.GGMLQuantizationType
    return kinds.F32 if len(shape) == 1 else {"fp32": kinds.F32, "fp16": kinds.F16, "bf16": kinds.BF16}[dtype]


def _stored(value: torch.Tensor, kind: str) -> Any:
    """Return an array of the dtype's bits: numpy has no bf16."""
    value = value.contiguous()
    if kind == "BF16":
        return value.bfloat16().view(torch.int16).numpy()
    return (value.half() if kind == "F16" else value.float()).numpy()


def _read_back(trained: Trained, text: Any, folder: Path, dtype: str, name: Path) -> LossAgreement:
    try:
        import llama_cpp  # type: ignore[import-not-found]
    except ImportError:
        return compare_losses(
            trained, text, _by_transformers(trained.config, folder), dtype, "transformers' GGUF reader", name
        )
    model = llama_cpp.Llama(
        str(folder / FILE), n_ctx=trained.config.max_positions, logits_all=True, verbose=False, n_threads=1
    )
    _check_tokens(trained, model, name)

    def logits(given: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = []
        for row in given["input_ids"].tolist():
            model.reset()
            model.eval(row)
            rows.append(torch.tensor(model.scores[: len(row)]))
        return torch.stack(rows)

    return compare_losses(trained, text, logits, dtype, "llama.cpp", name)


def _by_transformers(model: ModelConfig, folder: Path) -> Any:
    """Return the logits of transformers' GGUF reader, which gives GPT-2 1,024 positions unless it is told."""
    from transformers import AutoModelForCausalLM

    given = {"config": form_of(model).their_config(model)} if form_of(model) is GPT2 else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32, **given)
    return logits_of(loaded.eval())


def _check_tokens(trained: Trained, model: Any, name: Path) -> None:
    assert trained.tokenizer is not None
    expected = load_tokenizer(trained.tokenizer).encode([TEXT])[0].tolist()
    found = model.tokenize(TEXT.encode(), add_bos=False, special=False)
    if found != expected:
        raise CheckpointError(
            f"{name} is not the model of the run: llama.cpp cuts text into other tokens",
            f"those of {trained.tokenizer}",
            f"report it with its tokenizer.json ({json.dumps(_splitter(read_files(trained.tokenizer).tree))})",
        )
