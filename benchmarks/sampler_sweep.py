"""Which sampler, how many steps, how much guidance: attributes right against network calls, on the
checkpoints of a quickstart.

The base stage draws held-out pictures from their true embeddings; they are enlarged and judged
(data/toy_coco.py). A guided step is two calls. Writes samplers.png and guidance.png as well.

    python benchmarks/sampler_sweep.py --run output/quickstart --output_dir benchmarks
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import torch  # noqa: E402
import toy_coco  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torchvision.transforms.v2 import functional as TF  # noqa: E402

from dalle2.clip import load_clip  # noqa: E402
from dalle2.images import load_image, resize, to_uint8  # noqa: E402
from dalle2.models import load_decoder  # noqa: E402
from dalle2.render import list_coco_jobs  # noqa: E402
from dalle2.sampling import sample_images  # noqa: E402

STEPS = 5, 10, 20, 50, 125
SCALES = 1.0, 1.5, 2.0, 3.0, 5.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="output/quickstart")
    parser.add_argument("--output_dir", default="benchmarks")
    parser.add_argument("--num_images", type=int, default=96)
    args = parser.parse_args()
    run, out = Path(args.run), Path(args.output_dir)
    annot_path = run / "toy_coco" / "captions_val.json"
    jobs = list_coco_jobs(annot_path, run / "toy_coco" / "val", 0, args.num_images)
    truth = toy_coco.load_attributes(annot_path)
    wanted = [truth[job["image_id"]] for job in jobs]
    clip = load_clip("", str(run / "clip" / "clip.safetensors"))
    embeds = torch.cat([clip.embed_image(load_image(job["photo"])[None]) for job in jobs])
    unets, configs, _ = load_decoder(run / "decoder" / "decoder.safetensors")

    def judge(**options):
        """Share of all attributes right."""
        images = torch.cat([sample_images([unets[1]], [configs[1]], part, [
            1000 * number + row for row in range(len(part))], **options)
            for number, part in enumerate(embeds.split(16))])
        pictures = [TF.to_pil_image(to_uint8(resize(image, 128))) for image in images]
        return toy_coco.compute_accuracy(toy_coco.map_check(pictures, wanted))["all"]

    def compute_diversity(**options):
        """Mean standard deviation of a pixel over four seeds, of the first 16 pictures."""
        draws = torch.stack([sample_images([unets[1]], [configs[1]], embeds[:16],
                                           range(s, s + 16), **options)
                             for s in (0, 1000, 2000, 3000)])
        return draws.std(0).mean().item()

    print(f"{len(jobs)} held-out pictures, base stage, guidance {configs[1].cond_scale}\n")
    print("| sampler | " + " | ".join(f"{2 * n} calls" for n in STEPS) + " |")
    print("|---" * (len(STEPS) + 1) + "|")
    found = {}
    for sampler in ("ddim", "dpmpp_2m", "ddpm"):
        found[sampler] = [judge(sampler=sampler, sample_timesteps=n) for n in STEPS]
        print(f"| {sampler} | " + " | ".join(f"{100 * x:.1f}" for x in found[sampler]) + " |",
              flush=True)
    reference = judge(sampler="ddim", sample_timesteps=250)
    print(f"\nddim, 250 steps (500 calls): {100 * reference:.1f}\n")
    print("| guidance | all attributes | diversity |\n|---|---|---|")
    guidance = []
    for scale in SCALES:
        guidance.append((judge(cond_scale=scale), compute_diversity(cond_scale=scale)))
        print(f"| {scale} | {100 * guidance[-1][0]:.1f} | {guidance[-1][1]:.4f} |", flush=True)
    plot(out, found, reference, guidance)
    (out / "sampler_sweep.json").write_text(json.dumps(
        {"steps": STEPS, "accuracy": found, "ddim_250": reference, "scales": SCALES,
         "guidance": guidance}))


def plot(out, found, reference, guidance):
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for sampler, accuracy in found.items():
        axes.plot([2 * n for n in STEPS], [100 * x for x in accuracy], marker="o", label=sampler)
    axes.axhline(100 * reference, color="gray", linestyle=":", label="ddim, 500 calls")
    axes.set(xscale="log", xlabel="network calls of the base stage",
             ylabel="attributes right, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "samplers.png", dpi=80)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    accuracy, diversity = zip(*guidance)
    axes.plot(diversity, [100 * x for x in accuracy], marker="o")
    for scale, x, y in zip(SCALES, diversity, accuracy):
        axes.annotate(f"{scale:g}", (x, 100 * y), xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel="diversity: standard deviation of a pixel over seeds",
             ylabel="attributes right, %", title="guidance of the base stage")
    axes.grid(alpha=0.3)
    figure.savefig(out / "guidance.png", dpi=80)


if __name__ == "__main__":
    main()
