"""Trains the two adapters of the demonstration checkpoint that lie here, on a CPU, in minutes
(`lora --minutes 6 --pictures 500` and `outline --minutes 16 --lr 1e-3 --pictures 1000`).

    python examples/adapters/train.py lora     # sepia.safetensors: everything as an old photograph
    python examples/adapters/train.py outline  # outline.safetensors: shapes follow an outline (a T2I-Adapter)

Their only data are pictures drawn here, with captions as the checkpoint knows them. Needs torch, diffusers, transformers, peft, pillow (made
with 2.15, 0.42.1, 5.23, 0.21.2, 13.0) and CLIP's tokenizer as a folder (--tokenizer).
"""
import argparse
import math
import pathlib
import random
import time

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, T2IAdapter, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizerFast

HERE = pathlib.Path(__file__).parent
DEMO = HERE.parent.parent / "assets/demo"
SIDE, LARGE = 128, 384
COLOURS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 84, 214), "yellow": (250, 209, 46),
    "orange": (245, 132, 31), "purple": (128, 54, 176), "pink": (245, 130, 180), "cyan": (38, 198, 218),
    "brown": (121, 78, 44), "black": (20, 20, 24), "white": (248, 248, 246), "gray": (140, 144, 150),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring")
SKIES = {"sunset": ((70, 40, 110), (250, 140, 70)), "noon": ((70, 150, 235), (190, 225, 250)), "dawn": ((110, 140, 210), (250, 200, 190))}


def polygon(shape, x, y, r):
    def at(radius, angle):
        return x + radius * math.sin(angle), y - radius * math.cos(angle)

    return {
        "square": lambda: [at(r * 1.15, math.pi / 4 + k * math.pi / 2) for k in range(4)],
        "triangle": lambda: [at(r * 1.15, k * 2 * math.pi / 3) for k in range(3)],
        "star": lambda: [at(r * (1.2 if k % 2 == 0 else 0.5), k * math.pi / 5) for k in range(10)],
        "diamond": lambda: [(x, y - r * 1.2), (x + r * 0.75, y), (x, y + r * 1.2), (x - r * 0.75, y)],
    }[shape]()


def put(pen, shape, colour, x, y, r):
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=int(r * 0.34))
    else:
        pen.polygon(polygon(shape, x, y, r), fill=colour)


def one_shape(rng):
    colour, ground = rng.sample(sorted(COLOURS), 2)
    shape = rng.choice(SHAPES)
    picture = Image.new("RGB", (LARGE, LARGE), COLOURS[ground])
    x, y = (LARGE * (0.5 + rng.uniform(-0.15, 0.15)) for _ in range(2))
    put(ImageDraw.Draw(picture), shape, COLOURS[colour], x, y, LARGE * rng.uniform(0.16, 0.36))
    return picture, f"a {colour} {shape} on a {ground} background"


def landscape(rng):
    hour = rng.choice(sorted(SKIES))
    picture = Image.new("RGB", (LARGE, LARGE))
    pen = ImageDraw.Draw(picture)
    horizon = LARGE * rng.uniform(0.56, 0.64)
    for y in range(LARGE):
        f = min(1.0, y / horizon)
        pen.line((0, y, LARGE, y), fill=tuple(int(a + (b - a) * f) for a, b in zip(*SKIES[hour])))
    x, r = LARGE * rng.uniform(0.2, 0.8), LARGE * 0.1
    y = LARGE * 0.16 if hour == "noon" else horizon - r * 0.4
    sun = {"sunset": ("red", (255, 96, 48)), "noon": ("yellow", (255, 232, 90)), "dawn": ("pale", (255, 170, 120))}[hour]
    pen.ellipse((x - r, y - r, x + r, y + r), fill=sun[1])
    if rng.random() < 0.5:
        for k in range(3):
            cx, h, w = LARGE * (k + rng.uniform(0.1, 0.9)) / 3, LARGE * rng.uniform(0.24, 0.4), LARGE * rng.uniform(0.26, 0.36)
            pen.polygon([(cx - w, horizon + 4), (cx, horizon - h), (cx + w, horizon + 4)], fill=(96, 104, 122))
        pen.rectangle((0, horizon, LARGE, LARGE), fill=(74, 120, 70))
        return picture, f"mountains at {hour} with a {sun[0]} sun"
    a, b = rng.uniform(0, 6), rng.uniform(0, 6)
    edge = [(x, horizon + LARGE * (0.045 * math.sin(a + x / LARGE * 7) + 0.03 * math.sin(b + x / LARGE * 13))) for x in range(0, LARGE + 8, 8)]
    pen.polygon(edge + [(LARGE, LARGE), (0, LARGE)], fill=(82, 150, 74))
    return picture, f"hills at {hour} with a {sun[0]} sun"


def edges(picture):
    """White where colours change, on black."""
    grey = np.asarray(picture.filter(ImageFilter.BoxBlur(2)), dtype=np.int16)
    across = np.abs(np.diff(grey, axis=1, prepend=grey[:, :1])).max(2)
    down = np.abs(np.diff(grey, axis=0, prepend=grey[:1])).max(2)
    lines = Image.fromarray(((np.maximum(across, down) > 6) * 255).astype(np.uint8))
    return lines.filter(ImageFilter.MaxFilter(3)).resize((SIDE, SIDE), Image.LANCZOS)


def sepia(picture):
    """Shades of one colour, as an old photograph has them."""
    grey = np.asarray(picture.resize((SIDE, SIDE), Image.LANCZOS).convert("L"), dtype=np.float32)[..., None] / 255
    dark, paper = np.array([40, 22, 10.0]), np.array([250, 232, 196.0])
    return Image.fromarray((dark + (paper - dark) * grey).clip(0, 255).astype(np.uint8))


def pixels(picture):
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


class Data:
    """Latents, texts and outlines of pictures that are drawn once."""

    def __init__(self, args, style):
        tokenizer = CLIPTokenizerFast.from_pretrained(args.tokenizer)
        text = CLIPTextModel.from_pretrained(DEMO / "text_encoder").float()
        vae = AutoencoderKL.from_pretrained(DEMO / "vae").float()
        rng = random.Random(args.seed)
        self.latents, self.texts, self.hints = [], [], []
        states = lambda words: text(**tokenizer(words, padding="max_length", max_length=77, return_tensors="pt"))[0][0]
        self.nothing = states("")
        for _ in range(args.pictures):
            picture, caption = one_shape(rng) if rng.random() < 0.7 else landscape(rng)
            small = sepia(picture) if style else picture.resize((SIDE, SIDE), Image.LANCZOS)
            self.latents.append(vae.encode(pixels(small)[None]).latent_dist.mode()[0] * vae.config.scaling_factor)
            self.texts.append(states(caption))
            self.hints.append(torch.from_numpy(np.asarray(edges(picture), dtype=np.float32) / 255)[None])

    def batch(self, size):
        picks = random.sample(range(len(self.latents)), size)
        texts = [self.nothing if random.random() < 0.1 else self.texts[i] for i in picks]
        return torch.stack([self.latents[i] for i in picks]), torch.stack(texts), torch.stack([self.hints[i] for i in picks])


def train(args, parameters, predict, data):
    noise = DDPMScheduler.from_config(DDPMScheduler.load_config(DEMO / "scheduler"))
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=1e-4)
    start, step, sums = time.time(), 0, 0.0
    while (done := (time.time() - start) / (60 * args.minutes)) < 1:
        latents, texts, hints = data.batch(args.batch)
        t, e = torch.randint(0, 1000, (args.batch,)), torch.randn_like(latents)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1, step / 50) * (1 - 0.9 * done)
        loss = (predict(noise.add_noise(latents, e, t), t, texts, hints) - e).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        sums, step = sums + loss.item(), step + 1
        if step % 100 == 0:
            print(f"step {step}, {done:.0%}, loss {sums / 100:.4f}", flush=True)
            sums = 0.0


def main(args):
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    unet = UNet2DConditionModel.from_pretrained(DEMO / "unet").float().requires_grad_(False)
    with torch.no_grad():
        data = Data(args, args.what == "lora")
    print("the pictures are drawn", flush=True)
    if args.what == "lora":
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_in", "conv_out"]
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=layers))
        parameters = [p for p in unet.parameters() if p.requires_grad]
        train(args, parameters, lambda x, t, c, _: unet(x, t, c).sample, data)
        state = {name: value.half() for name, value in get_peft_model_state_dict(unet).items()}
        StableDiffusionPipeline.save_lora_weights(HERE, unet_lora_layers=state, weight_name="sepia.safetensors")
    else:
        adapter = T2IAdapter(in_channels=1, channels=list(unet.config.block_out_channels), num_res_blocks=1, downscale_factor=8)
        predict = lambda x, t, c, h: unet(x, t, c, down_intrablock_additional_residuals=adapter(h)).sample
        train(args, list(adapter.parameters()), predict, data)
        save_file({name: value.half().contiguous() for name, value in adapter.state_dict().items()}, HERE / "outline.safetensors")
        star = Image.new("RGB", (LARGE, LARGE))
        put(ImageDraw.Draw(star), "star", COLOURS["white"], LARGE / 2, LARGE * 0.53, LARGE * 0.33)
        edges(star).save(HERE / "star.png", optimize=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("lora", "outline"))
    p.add_argument("--tokenizer", required=True, help="a folder with CLIP's tokenizer.json")
    p.add_argument("--minutes", type=float, default=15)
    p.add_argument("--pictures", type=int, default=600)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    main(p.parse_args())
