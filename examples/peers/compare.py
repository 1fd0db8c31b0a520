"""Times sd-rs beside PyTorch and OpenVINO on this machine: one UNet step with guidance and one VAE decode of Stable Diffusion 1.5, and with
`--cases unet-xl:1024` one UNet step of Stable Diffusion XL.

    pip install torch diffusers==0.42.1 transformers==5.23.0 openvino        # once
    python examples/peers/compare.py --sd-rs target/release/sd-rs

Weights are random, of full size. Engines take turns, one process at a time, each with one call that is not counted; medians are printed, and
the ratio to each peer in the same type. The converted OpenVINO models are kept in the folder given by --cache (4 GB).

On an NVIDIA card, beside PyTorch as it is and compiled for the card (`max-autotune`, channels last):

    python examples/peers/compare.py --device cuda --engines sd-rs torch torch-compiled --dtypes bf16 --cases unet:512 unet-xl:1024 vae:512 --calls 20
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

UNET = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280))
UNET_XL = dict(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280), use_linear_projection=True,
    transformer_layers_per_block=(1, 2, 10), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)


def networks(part, kind=None):
    """A network with random weights, made in the type `kind`: the large one would not fit twice."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_default_dtype(kind or torch.float32)
    with torch.no_grad():
        made = {"unet": lambda: UNet2DConditionModel(**UNET), "unet-xl": lambda: UNet2DConditionModel(**UNET_XL), "vae": lambda: AutoencoderKL(**VAE)}
        network = made[part]().eval()
    torch.set_default_dtype(torch.float32)
    if part == "unet-xl":
        whole = network.forward
        network.forward = lambda sample, timestep, context, text, ids, return_dict=True: whole(
            sample, timestep, context, added_cond_kwargs=dict(text_embeds=text, time_ids=ids), return_dict=return_dict)
    return network


def inputs(part, size):
    import torch

    latent = size // 8
    if part == "unet":
        return torch.randn(2, 4, latent, latent), torch.tensor(500.0), torch.randn(2, 77, 768)
    if part == "unet-xl":
        ids = torch.tensor([[size, size, 0.0, 0.0, size, size]] * 2)
        return torch.randn(2, 4, latent, latent), torch.tensor(500.0), torch.randn(2, 77, 2048), torch.randn(2, 1280), ids
    return (torch.randn(1, 4, latent, latent),)


def timed(call, calls, warm=1):
    seconds = []
    for _ in range(calls + warm):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds[warm:]


def torch_times(part, size, dtype, args, compiled=False):
    import torch

    kind = dict(f32=torch.float32, bf16=torch.bfloat16)[dtype]
    network = networks(part, kind).to(args.device, memory_format=torch.channels_last)
    given = [(x.to(kind) if x.ndim else x).to(args.device) for x in inputs(part, size)]
    run = network.decode if part == "vae" else network
    if compiled:
        run = torch.compile(run, mode="max-autotune", fullgraph=True)

    def call():
        run(*given, return_dict=False)
        if args.device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        # a compiled network records its graph in the second and third call
        return timed(call, args.calls, warm=4 if compiled else 1)


def torch_compiled_times(part, size, dtype, args):
    return torch_times(part, size, dtype, args, compiled=True)


def openvino_times(part, size, dtype, args):
    import openvino as ov
    import torch

    path = Path(args.cache) / f"{part}.xml"
    if not path.exists():
        network = networks(part)
        if part == "vae":
            network.forward = network.decode
        with torch.no_grad():
            model = ov.convert_model(network, example_input=inputs(part, 256))
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(model, path, compress_to_fp16=True)
        del model, network
    core = ov.Core()
    model = core.read_model(path)
    given = [x.numpy() for x in inputs(part, size)]
    model.reshape({port: value.shape for port, value in zip(model.inputs, given)})
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": dtype}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return timed(lambda: request.infer(given), args.calls)


def our_times(part, size, dtype, args):
    family = "sdxl" if part == "unet-xl" else "sd15"
    command = [args.sd_rs, "bench", "--random-weights", family, "--size", str(size), "--dtype", dtype, "--device", args.device, "--json", "--quiet"]
    command += ["--steps", str(1 if part == "vae" else args.calls), "--decodes", str(args.calls if part == "vae" else 1)]
    timings = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["timings"]
    return timings["decodes_s"] if part == "vae" else timings["step_s"]


PEERS = {"torch": torch_times, "torch-compiled": torch_compiled_times, "openvino": openvino_times}


def in_process(engine, part, size, dtype, args):
    """Seconds of each call, measured in a process of its own so that memory starts empty."""
    if engine == "sd-rs":
        return our_times(part, size, dtype, args)
    one = [sys.executable, __file__, "--one", engine, part, str(size), dtype, "--calls", str(args.calls), "--cache", args.cache, "--device", args.device]
    done = subprocess.run(one, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-rs", default="target/release/sd-rs")
    parser.add_argument("--calls", type=int, default=5, help="calls of each engine in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="*", default=["unet:256", "unet:512", "vae:512"], help="part:size")
    parser.add_argument("--dtypes", nargs="*", default=["bf16", "f32"])
    parser.add_argument("--engines", nargs="*", default=["sd-rs", "openvino", "torch"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cache", default="target/peers")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        engine, part, size, dtype = args.one
        print(json.dumps(PEERS[engine](part, int(size), dtype, args)))
        return
    print(platform.platform(), platform.processor(), time.strftime("%Y-%m-%d"))
    for case in args.cases:
        part, size = case.split(":")
        for dtype in args.dtypes:
            seconds = {engine: [] for engine in args.engines}
            for _ in range(args.rounds):
                for engine in args.engines:
                    seconds[engine] += in_process(engine, part, int(size), dtype, args)
            medians = {engine: statistics.median(times) for engine, times in seconds.items()}
            cells = []
            for engine, median in medians.items():
                times = seconds[engine]
                ratio = "" if engine == "sd-rs" else f", ours is {medians['sd-rs'] / median:.2f} of it"
                cells.append(f"{engine} {median:.4f} s ({min(times):.4f} to {max(times):.4f}{ratio})")
            print(f"{case} {dtype}: " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
