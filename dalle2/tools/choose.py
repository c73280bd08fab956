"""Chooses the weights of a run by what they draw: `python -m dalle2.tools.choose --run_dir FOLDER`.

The candidates are averages of several lengths at several steps (dalle2.tools.averages) and the
run's exports. All of them draw for the same held-out photos from the same seeds: a prior draws an
embedding for the first caption of each photo, the first decoder stage a picture from the photo's
embedding, a later stage one from the photo in the size of the stage before. The scores are kept in
`choice.json`; the same command computes only those that are missing.
"""

import hashlib
import json
from functools import partial

import torch

from dalle2 import cli
from dalle2.clip import load_clip
from dalle2.errors import UserError, rename_argument
from dalle2.files import replace_file
from dalle2.images import to_uint8
from dalle2.pipeline import load_matching_clip
from dalle2.prepare import prepare_store
from dalle2.rng import derive_seed
from dalle2.tools import metrics
from dalle2.tools.averages import MAX_SIGMA_REL
from dalle2.tools.candidates import (
    describe,
    draw,
    list_candidates,
    load_true_and_conditions,
    load_weights,
    open_run,
    write_chosen,
)

NUM_GROUPS = 20  # of photos, each left out once for the standard errors
MIN_IMAGES = 4
COLUMNS = {"step": "{}", "sigma_rel": "{:g}", "score": "{:.5g}", "error": "{:.2g}",
           "gap": "{:.2g}", "gap_error": "{:.2g}", "mismatch": "{:.3f}"}


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--run_dir", default="output/prior", help="run folder of a prior, or of one"
                        " stage of a decoder such as output/decoder/unet1")
    parser.add_argument("--sigma_rel", type=float, nargs="+", default=[0.05, 0.075, 0.1, 0.15],
                        help="lengths of the averages, as a share of the steps so far")
    parser.add_argument("--steps", type=int, nargs="+", help="steps whose averages are "
                        "candidates (None: all that have snapshots)")
    parser.add_argument("--last_steps", type=int, default=0, help="use only this many "
                        "of them, the last ones (0: all)")
    parser.add_argument("--write", action="store_true", help="write the best weights into "
                        "prior.safetensors, or into their stage of decoder.safetensors")
    data = parser.add_argument_group("data")
    data.add_argument("--val_img_path", default=f"{cli.DATA_DIR}/val2014", help="picture folder")
    data.add_argument("--val_annot_path", help="COCO captions file",
                      default=f"{cli.DATA_DIR}/annotations/captions_val2014.json")
    data.add_argument("--num_images", type=int, help="pictures to draw for, the first ones of the "
                      "file (None: 1000 for a prior, 200 for a decoder)")
    data.add_argument("--store_dir", default=cli.STORE_DIR, help="where the prepared pictures "
                      "and embeddings are")
    data.add_argument("--clip_model", help="None: the CLIP that the run names")
    data.add_argument("--clip_pretrained", help="None: the CLIP that the run names")
    score = parser.add_argument_group("score")
    score.add_argument("--metric", choices=list(METRICS), help="cosine to the photo's embedding, "
                       "CMMD or KID (None: cosine for a prior, because CMMD does not see whether "
                       "an embedding fits its caption; cmmd for a decoder)")
    score.add_argument("--judge_clip_model", help="CLIP that embeds the pictures for cosine and "
                       "cmmd (None: the one that the decoder is conditioned on)")
    score.add_argument("--judge_clip_pretrained", help="its open_clip tag, or a file")
    score.add_argument("--inception_weights", help="file for kid (None: torch's cache, or a "
                       "download)")
    score.add_argument("--seed", type=int, default=0)
    score.add_argument("--batch_size", type=int, default=64, help="pictures or embeddings "
                       "drawn at a time")
    args = parser.parse_args()
    for name, low, high in (("num_images", MIN_IMAGES, 1e9), ("batch_size", 1, 1e9),
                            ("last_steps", 0, 1e9), ("sigma_rel", 0.01, MAX_SIGMA_REL)):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [low if value is None else value]:
            if not low <= number <= high:
                raise UserError(f"{number} is not between {low} and {high:g}", name)
    if args.judge_clip_model and not args.judge_clip_pretrained:
        raise UserError("needed with --judge_clip_model", "judge_clip_pretrained")
    return args


def main():
    args, device = parse_args(), cli.pick_device()
    run = open_run(args.run_dir)
    metric = args.metric or ("cmmd" if run.unet_number else "cosine")
    if not run.unet_number and (metric == "kid" or args.judge_clip_pretrained):
        raise UserError("a prior draws embeddings of its CLIP, not pictures",
                        "metric" if metric == "kid" else "judge_clip_pretrained")
    candidates, clip = list_candidates(args, run), run.header["clip"]
    args.prior_ckpt = run.export  # the file of the CLIP may be in the same folder
    own_clip, _ = load_matching_clip(args, clip, clip, device)
    judge, features = load_judge(args, metric, run, own_clip, device)
    num_images = args.num_images or (200 if run.unet_number else 1000)
    with rename_argument(annot_path="val_annot_path", img_path="val_img_path"):
        store = prepare_store(args.val_img_path, args.val_annot_path, args.store_dir,
                              clip=own_clip, max_images=num_images)
    if len(store) < MIN_IMAGES:
        raise UserError(f"{MIN_IMAGES} pictures are needed, it has {len(store)}", "val_annot_path")

    # ---- compute the scores that are missing
    settings = {"metric": metric, "features": features, "pictures": len(store), "seed": args.seed,
                "data": store.folder.name, "clip": clip["fingerprint"], "network": {
                    name: value for name, value in run.header["config"].items() if name != "train"}}
    path = run.folder / "choice.json"
    known = json.loads(path.read_text())["known"] if path.is_file() else {}
    for candidate in candidates:
        candidate["key"] = make_key(settings, candidate)
    missing = [candidate for candidate in candidates if candidate["key"] not in known]
    if missing:
        true, conditions = load_true_and_conditions(run, store)
        true = call_in_batches(judge, args.batch_size, true)
        network = run.build_network().to(device).eval()
        seeds = torch.tensor([derive_seed(args.seed, row) for row in range(len(store))])

    def draw_features(seeds, *conditions):
        conditions = [part.to(device) for part in conditions]
        return judge(draw(run, network, conditions, seeds.tolist()))

    for candidate in missing:
        network.load_state_dict(load_weights(run, candidate))
        drawn = call_in_batches(draw_features, args.batch_size, seeds, *conditions)
        scores = known[candidate["key"]] = compute_scores(metric, drawn, true)
        save_json(path, {"known": known})
        print(f"{describe(candidate)}: {metric} {scores[0]:.5f}", flush=True)

    # ---- choose
    best = rank(candidates, known, metric)
    report(run, candidates, best, settings, known)
    if args.write:
        write_chosen(run, best, metric)


# ----------------------------------------------------------------------------------------------
# drawing and scoring


def load_judge(args, metric, run, own_clip, device):
    """(function from image (B, 3, H, W) in [0, 1] to features (B, F), description of the features).
    What a prior draws are already features."""
    own = f"CLIP {run.header['clip']['fingerprint']}"
    if not run.unet_number:
        return lambda image_embed: image_embed, f"{own}, the prior's own"
    if metric == "kid":
        inception = metrics.load_inception(args.inception_weights, device)
        return lambda image: inception(to_uint8(image)), "Inception-v3"
    if not args.judge_clip_pretrained:
        return own_clip.embed_image, f"{own}, which also conditions the decoder"
    with rename_argument(clip_model="judge_clip_model", clip_pretrained="judge_clip_pretrained"):
        clip = load_clip(args.judge_clip_model or run.header["clip"]["clip_model"],
                         args.judge_clip_pretrained, device)
    return clip.embed_image, f"CLIP {clip.fingerprint}"


def call_in_batches(function, batch_size, *tensors):
    """`function` of tensors (N, ...), computed batch_size rows at a time; the result is on the CPU.
    """
    return torch.cat([function(*parts).cpu()
                      for parts in zip(*(tensor.split(batch_size) for tensor in tensors))])


def compute_mmd(kernel, drawn, true):
    """Unbiased squared MMD of paired samples (Gretton et al. 2012, eq. 4): the pairs of a picture
    and its own photo are left out, because they are more alike than independent samples."""
    drawn, true = drawn.double(), true.double()
    across = kernel(drawn, true)  # (N, N)
    terms = (kernel(drawn, drawn) + kernel(true, true) - across - across.T).fill_diagonal_(0)
    return terms.sum().item() / (len(true) * (len(true) - 1))


METRICS = {  # functions of features drawn (N, F) and true (N, F), in the same order
    "cosine": lambda drawn, true: (drawn * true).sum(-1).mean().item(),
    # the kernels of metrics.compute_cmmd and of Binkowski et al. 2018 (arXiv 1801.01401)
    "cmmd": partial(compute_mmd, lambda x, y: metrics.CMMD_SCALE * torch.exp(
        -torch.cdist(x, y).square() / (2 * metrics.CMMD_SIGMA ** 2))),
    "kid": partial(compute_mmd, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3)}


def make_key(settings, candidate):
    """A key for a score, made from all that it depends on; files by their time of change."""
    files = [(path.name, path.stat().st_mtime_ns) for path in candidate["sources"]]
    parts = json.dumps([settings, describe(candidate), files])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def compute_scores(metric, drawn, true):
    """[score of all photos, *scores without each of NUM_GROUPS groups of photos]."""
    group = torch.arange(len(true)) % NUM_GROUPS
    return [METRICS[metric](drawn[kept], true[kept])
            for kept in (group >= 0, *(group != number for number in group.unique()))]


def compute_error(left_out):
    """Standard error of a score by the jackknife; left_out: the scores without each group."""
    left_out = torch.tensor(left_out, dtype=torch.float64)
    return ((len(left_out) - 1) * left_out.var(correction=0)).sqrt().item()


def rank(candidates, known, metric):
    """The best candidate. Adds to each one "score" and its standard "error", and "gap", by how much
    it is worse than the best (0 or more), with "gap_error", which is smaller than the errors of the
    two scores because both draw for the same photos from the same seeds."""
    is_higher_better = metric == "cosine"
    best = (max if is_higher_better else min)(candidates, key=lambda row: known[row["key"]][0])
    for row in candidates:
        score, *left_out = known[row["key"]]
        gap, *gaps = [b - a if is_higher_better else a - b
                      for a, b in zip(known[row["key"]], known[best["key"]])]
        row |= {"score": score, "error": compute_error(left_out), "gap": gap,
                "gap_error": compute_error(gaps)}
    return best


# ----------------------------------------------------------------------------------------------
# results


def report(run, candidates, best, settings, known):
    """Prints the table; writes choice.json and choice.png."""
    metric = settings["metric"]
    print(f"\n{metric} of {settings['pictures']} pictures, {settings['features']}\n\n"
          f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for row in candidates:
        cells = ("–" if row[name] is None else COLUMNS[name].format(row[name]) for name in COLUMNS)
        print(f"| {' | '.join((row['export'] or '', *cells))} |")
    close = [describe(row) for row in candidates
             if row is not best and row["gap"] <= row["gap_error"]]
    print("\ngap: difference from the best, with its standard error; mismatch: the part of the "
          f"average that the snapshots cannot build\nbest: {describe(best)}; of "
          f"{len(candidates) - 1} others {len(close)} are within one standard error of it"
          f"{': ' * bool(close)}{'; '.join(close)}")
    lengths = sorted({row["sigma_rel"] for row in candidates if not row["export"]})
    if len(lengths) > 1 and best["sigma_rel"] in (lengths[0], lengths[-1]):
        length = "shorter" if best["sigma_rel"] == lengths[0] else "longer"
        print(f"this is the last value of --sigma_rel: a {length} average may be better still")
    rows = [{name: row[name] for name in ("export", *COLUMNS)} for row in candidates]
    save_json(run.folder / "choice.json", {
        "settings": settings, "best": rows[candidates.index(best)], "close": close,
        "candidates": rows, "known": known})
    save_plot(run.folder / "choice.png", candidates, best, metric)


def save_json(path, value):
    replace_file(path, lambda part: part.write_text(json.dumps(value, indent=1)))


def save_plot(path, candidates, best, metric):
    """Score over the length of the average, one line a step; exports are horizontal lines."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    averages = [row for row in candidates if not row["export"]]
    for step in dict.fromkeys(row["step"] for row in averages):
        axes.errorbar(*zip(*((row["sigma_rel"], row["score"], row["error"])
                             for row in averages if row["step"] == step)),
                      label=f"step {step}", marker="o", elinewidth=0.5)
    for number, row in enumerate(row for row in candidates if row["export"]):
        axes.axhline(row["score"], color="gray", linestyle=(":", "--")[number], label=describe(row))
    if not best["export"]:
        axes.plot(best["sigma_rel"], best["score"], "o", markersize=14, fillstyle="none",
                  color="black", linestyle="", label="best")
    axes.set_title("bars: standard error")
    axes.set_xlabel("sigma_rel (length of the average, as a share of training)")
    axes.set_ylabel(f"{metric} ({'higher' if metric == 'cosine' else 'lower'} is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    replace_file(path, lambda part: figure.savefig(part, format="png", dpi=80))


if __name__ == "__main__":
    cli.run(main)
