"""A page in the browser that renders prompts. Optional: it needs Gradio.

Everything is served from this machine: no share link, no telemetry, no fonts from the internet.
"""

import importlib.util
import os
import socket
import time
from dataclasses import replace

import torch

from dalle2 import cli
from dalle2.errors import UserError
from dalle2.images import to_uint8
from dalle2.pipeline import load_pipeline
from dalle2.rng import derive_seed

SEED = derive_seed(0, 0) % 2 ** 31  # of the first picture of test_dalle2.py --seed 0
NEW_SEED = "() => Math.floor(Math.random() * 2 ** 31)"  # JavaScript
FONTS = "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"  # that operating systems have
CSS = """
.gradio-container {max-width: 1000px !important; width: 100%; margin: auto}
.submit-button {background: var(--button-primary-background-fill) !important; color: white}
#picture .image-frame, #picture img {width: 100%; object-fit: contain}
#picture .empty {aspect-ratio: 1}
#report :is(table, tr) {width: 100%; border: 0}
#report :is(th, td) {border: 0; border-bottom: 1px solid var(--border-color-primary);
                     padding: .3rem .1rem; font-variant-numeric: tabular-nums}
#report :is(th, td):not(:first-child) {text-align: right}
"""


def parse_args():
    parser = cli.Parser(__doc__)
    cli.add_checkpoint_flags(parser)
    page = parser.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1",
                      help="address to listen on; 0.0.0.0: every address of this machine")
    page.add_argument("--port", type=int, default=7860, help="port to listen on")
    return parser.parse_args()


def main():
    args = parse_args()
    check_port(args.host, args.port)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is not installed: pip install gradio")
    pipeline = load_pipeline(args, cli.pick_device())
    serve_page(build_page(pipeline), args.host, args.port)


# ----------------------------------------------------------------------------------------------
# rendering


def render(pipeline, prompt, seed, cond_scale, prior_cond_scale, sample_timesteps):
    """(picture, report): what test_dalle2.py renders with the seed that its manifest records.

    sample_timesteps: the prior's and each stage's. picture: uint8 (H, W, 3). report: the settings,
    clip_score, and `stages`, a list of {"stage", "sample_timesteps", "seconds"}. Raises UserError
    if prompt or seed is missing.
    """
    prompt = (prompt or "").strip()
    if not prompt:
        raise UserError("The prompt is empty: type what the picture should show.")
    if seed is None:
        raise UserError("The seed is empty: type a whole number.")
    options = pipeline.resolve_options(cond_scale=cond_scale, prior_cond_scale=prior_cond_scale,
                                       sample_timesteps=sample_timesteps)
    times = [read_clock()]
    timed = replace(pipeline, stages=[replace(stage, unet=record_start(stage.unet, times))
                                      for stage in pipeline.stages])
    sample = timed.sample([prompt], [seed], options)
    times.append(read_clock())
    score = (pipeline.clip.embed_image(sample.image) * sample.text_embed).sum().item()
    stages = [{"stage": name, "sample_timesteps": stage_options.sample_timesteps,
               "seconds": end - start}
              for (name, _), stage_options, start, end in zip(
                  list_stages(pipeline), options, times, times[1:])]
    report = {"seed": seed, "cond_scale": cond_scale, "prior_cond_scale": prior_cond_scale,
              "clip_score": score, "stages": stages}
    return to_uint8(sample.image[0]).permute(1, 2, 0).cpu().numpy(), report


def list_stages(pipeline):
    """list of (name, config): the prior's, then the decoder's."""
    return [("prior", pipeline.prior.config),
            *((f"unet {stage.unet_number}, {stage.config.image_size} px", stage.config)
              for stage in pipeline.stages)]


def record_start(unet, times):
    """`unet` as a function that appends the time of its first call to `times`."""
    started = []

    def call(*args, **kwargs):
        if not started:
            times.append(read_clock())
            started.append(True)
        return unet(*args, **kwargs)
    return call


def read_clock():
    """Seconds, after a GPU has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def format_report(report):
    """A report of `render` as Markdown."""
    rows = [(s["stage"], s["sample_timesteps"], s["seconds"]) for s in report["stages"]]
    rows.append(("together", *map(sum, list(zip(*rows))[1:])))
    return "\n".join([
        f"**CLIP score {report['clip_score']:.3f}** · seed {report['seed']} · guidance "
        f"{report['cond_scale']:g}, of the prior {report['prior_cond_scale']:g}", "",
        "| stage | steps | seconds |", "|:---|---:|---:|",
        *(f"| {name} | {steps} | {seconds:.2f} |" for name, steps, seconds in rows)])


# ----------------------------------------------------------------------------------------------
# the page


def build_page(pipeline):
    """The gradio.Blocks; its sliders begin at the values of the checkpoints' configs."""
    import gradio as gr

    def scale(label, value):
        return gr.Slider(min(1, value), max(8, value), value, step=0.1, label=label)

    def answer(prompt, seed, cond_scale, prior_cond_scale, *steps):
        try:
            picture, report = render(pipeline, prompt, seed, cond_scale, prior_cond_scale, steps)
        except UserError as error:
            return None, f"**{error}**"
        return picture, format_report(report)

    with gr.Blocks(title="DALL-E 2", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        prompt = gr.Textbox(label="Prompt", placeholder="what the picture should show",
                            autofocus=True, submit_btn="Render")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(show_label=False, format="png", interactive=False,
                                   buttons=["download", "fullscreen"], elem_id="picture")
                report = gr.Markdown("Times and CLIP score appear here.", elem_id="report")
            with gr.Column():
                new_seed = gr.Button("New seed", size="sm")
                seed = gr.Number(SEED, label="Seed", precision=0, buttons=[new_seed])
                scales = [scale("Guidance of the decoder, 1 is none",
                                pipeline.stages[0].config.cond_scale),
                          scale("Guidance of the prior, 1 is none",
                                pipeline.prior.config.cond_scale)]
                steps = [gr.Slider(1, min(config.timesteps, max(100, config.sample_timesteps)),
                                   config.sample_timesteps, step=1, precision=0,
                                   label=f"Steps of {name}")
                         for name, config in list_stages(pipeline)]
        new_seed.click(None, outputs=seed, js=NEW_SEED)
        prompt.submit(answer, [prompt, seed, *scales, *steps], [picture, report],
                      show_progress_on=picture)
    return page


def serve_page(page, host, port):
    """Serves until Ctrl-C."""
    import gradio as gr
    fonts = [gr.themes.Font(name) for name in FONTS]
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = f"{direct},localhost,{host}"  # Gradio checks whether its server runs
    page.launch(server_name=host, server_port=port, share=False, ssr_mode=False, quiet=True,
                show_error=True, footer_links=[], css=CSS, prevent_thread_lock=True,
                theme=gr.themes.Default(font=fonts, font_mono=fonts))
    print(f"http://{host}:{port} (Ctrl-C stops it)", flush=True)
    page.block_thread()


def check_port(host, port):
    """Raises UserError if the address cannot be listened on."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); "
                        "give another --port", "port") from error


if __name__ == "__main__":
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    cli.run(main)
