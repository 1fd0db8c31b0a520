"""Small good files for the fuzz targets to begin with: seeds/{header,pickle,gguf,config}.

    pip install torch numpy safetensors gguf; python seeds.py
"""
import json
import pathlib
import pickle

import gguf
import numpy as np
import torch
from safetensors.torch import save

HERE = pathlib.Path(__file__).parent
FIXTURES = HERE.parent / "fixtures"


def put(kind, name, data):
    path = HERE / "seeds" / kind
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(data)


def names():
    """A few names of every family, so that detection has something to find."""
    return ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight", "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            "joint_blocks.0.x_block.attn.qkv.weight", "double_blocks.0.img_attn.norm.key_norm.scale", "lora_unet_down_blocks_0.lora_down.weight", "control_model.x", "v_pred"]


def main():
    for i, name in enumerate(names()):
        shape = [(4, 4, 3, 3), (8, 4), (4,)][i % 3]
        tensors = {name: torch.zeros(shape, dtype=[torch.float32, torch.float16, torch.bfloat16][i % 3]), "x": torch.ones(2)}
        put("header", f"{i}", save(tensors, {"modelspec.architecture": "stable-diffusion-v1"}))
        for form, new in (("zip", True), ("old", False)):
            path = HERE / "seed.tmp"
            torch.save({"state_dict": tensors, "global_step": 3}, path, _use_new_zipfile_serialization=new)
            put("pickle", f"{i}-{form}", path.read_bytes())
            path.unlink()
        path = HERE / "seed.tmp"
        writer = gguf.GGUFWriter(path, "sd1")
        writer.add_string("general.name", "x")
        writer.add_array("list", [1, 2, 3])
        writer.add_tensor(name[:60], np.zeros(shape, np.float32))
        writer.add_tensor("q", gguf.quants.quantize(np.ones((2, 32), np.float32), gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        put("gguf", f"{i}", path.read_bytes())
        path.unlink()
    put("pickle", "plain", pickle.dumps({"a": [1, 2.5, "x", None, (1,)]}))
    seen = set()
    for case in sorted(FIXTURES.glob("models/*/case.json")):
        record = json.loads(case.read_text())
        configs = [c["config"] for c in record["components"].values()]
        configs += [v for k, v in record.get("files", {}).items() if "scheduler" in k]
        for config in configs:
            text = json.dumps(config)
            if text not in seen:
                seen.add(text)
                put("config", f"j{len(seen)}", b"j" + text.encode())
    clip = {"model": {"type": "BPE", "vocab": {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "b": 3, "c</w>": 4, "bc</w>": 5}, "merges": ["b c</w>"]}, "added_tokens": []}
    put("config", "clip", b"c" + json.dumps(clip).encode())
    t5 = {"model": {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["\u2581a", -1.5], ["x", -2.0]]}, "added_tokens": [{"content": "</s>"}]}
    put("config", "t5", b"t" + json.dumps(t5).encode())
    put("config", "spiece", b"p" + bytes([0x0A, 9, 0x0A, 5]) + b"<unk>" + bytes([0x18, 2, 0x0A, 9, 0x0A, 2]) + b"ab" + bytes([0x15, 0, 0, 0xC0, 0xBF]))


main()
