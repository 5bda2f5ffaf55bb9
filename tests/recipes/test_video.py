"""Pairs of frames with optical flow: reading, pairing, views, drawn moving scenes, and the recipe."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from making import TINY, cli, drawing
from test_pretrain import png
from torch import Tensor
from torchvision.io import write_png

from densessl import DistanceMatcher, cell_centers, coords_from_flow
from examples.pretrain.common.data.flow import read_flow, write_flow
from examples.pretrain.common.data.frames import FramePairs, FrameSource, find_pairs
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_video import PixProVideo
from examples.quickstart.moving import draw_frames, main


@pytest.fixture(scope="module")
def moving(tmp_path_factory) -> Path:
    """Sixteen drawn pairs, as the program writes them."""
    root = tmp_path_factory.mktemp("moving")
    main([str(root), "--pairs", "16", "--size", "64"])
    return root


# --- files of flow ----------------------------------------------------------------------------------------------------


def flow_of(height: int, width: int) -> Tensor:
    flow = 9 * torch.randn(2, height, width, generator=torch.Generator().manual_seed(height))
    flow[:, 1, 2] = torch.nan
    return flow


def test_flo_by_its_bytes(tmp_path):
    flow = flow_of(3, 5)
    data = struct.pack("<fii", 202021.25, 5, 3)
    for i in range(3):
        for j in range(5):
            known = (i, j) != (1, 2)
            data += struct.pack("<ff", *(flow[:, i, j].tolist() if known else (1.7e9, 0.0)))
    (tmp_path / "a.flo").write_bytes(data)
    torch.testing.assert_close(read_flow(tmp_path / "a.flo"), flow, equal_nan=True, rtol=0, atol=0)
    write_flow(tmp_path / "b.flo", flow)
    torch.testing.assert_close(read_flow(tmp_path / "b.flo"), flow, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_in_both_orders(dtype, tmp_path):
    flow = flow_of(3, 5)
    for name, values in (("first", flow.numpy()), ("last", flow.permute(1, 2, 0).numpy())):
        np.save(tmp_path / f"{name}.npy", values.astype(dtype))
        expected = torch.from_numpy(flow.numpy().astype(dtype).astype(np.float32))
        torch.testing.assert_close(read_flow(tmp_path / f"{name}.npy"), expected, equal_nan=True, rtol=0, atol=0)


def test_kittis_png(tmp_path):
    flow = (flow_of(3, 5) * 64).round() / 64
    known = flow.isfinite().all(0)
    numbers = np.zeros((3, 5, 3), np.int64)
    numbers[..., 2] = known.numpy()
    numbers[..., :2] = np.where(known[..., None], (flow.nan_to_num() * 64 + 2**15).permute(1, 2, 0).numpy(), 0)
    (tmp_path / "a.png").write_bytes(png(numbers, 16))
    torch.testing.assert_close(read_flow(tmp_path / "a.png"), flow, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.flo", b"no flow at all", r"a.flo cannot be read: expected a .flo file, which begins with 202021.25"),
        ("a.flo", struct.pack("<fii", 202021.25, 5, 3), r"expected 5 x 3 x 2 numbers of 4 bytes, got 0 bytes"),
        ("a.flo", b"", r"expected a .flo file"),
        ("a.npy", b"", r"a.npy cannot be read"),
        ("a.npy", np.zeros((2, 4, 2), np.float32), r"expected floating point \(H, W, 2\) or \(2, H, W\)"),
        ("a.npy", np.zeros((3, 4, 2), np.int32), r"expected floating point .* got int32"),
        ("a.png", png(np.zeros((3, 5, 3), np.int64), 8), r"a.png cannot be read: expected 16 bits"),
    ],
)
def test_files_that_hold_no_flow_are_named(name, content, message, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(RuntimeError, match=message):
        read_flow(tmp_path / name)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_frames_are_paired_with_the_next_one_by_number(tmp_path):
    frames, flow, masks = (tmp_path / name for name in ("frames", "flow", "masks"))
    for scene, numbers in (("a", (1, 2, 10)), ("b", (7, 9))):
        for number in numbers:
            for root in (frames, masks):
                (root / scene).mkdir(parents=True, exist_ok=True)
                write_png(torch.zeros(3, 4, 6, dtype=torch.uint8), str(root / scene / f"frame_{number}.png"))
        (flow / scene).mkdir(parents=True)
        for number in numbers[:-1]:
            write_flow(flow / scene / f"frame_{number}.flo", torch.zeros(2, 4, 6))
    pairs = find_pairs(frames, flow, masks)
    names = [(pair.frame.parent.name, pair.frame.stem, pair.source.stem, pair.occluded.stem) for pair in pairs]
    assert names == [
        ("a", "frame_1", "frame_2", "frame_1"),
        ("a", "frame_2", "frame_10", "frame_2"),
        ("b", "frame_7", "frame_9", "frame_7"),
    ]
    with pytest.raises(ValueError, match=r"data.flow: expected flow \(.flo, .npy\) below .*, found none"):
        find_pairs(masks, masks)
    with pytest.raises(ValueError, match=r"data.flow: expected a folder, got .*nowhere"):
        find_pairs(frames, tmp_path / "nowhere")
    (masks / "b" / "frame_7.png").unlink()
    with pytest.raises(ValueError, match=r"data.occluded: expected a mask b/frame_7"):
        find_pairs(frames, flow, masks)
    write_flow(flow / "b" / "frame_9.flo", torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match=r"expected a frame b/frame_9 .* it is the last one of its folder"):
        find_pairs(frames, flow)
    (flow / "b" / "frame_9.flo").unlink()
    with pytest.raises(ValueError, match=r"data.flow: expected a flow for each of 9 processes, found 3"):
        FrameSource(str(frames), str(flow)).count(9, 0)


def test_views_of_frame_b_hold_positions_in_frame_a(tmp_path, caplog):
    """Both frames' colours are positions in frame A: a matched pair of pixels shows the same colour."""
    height, width = 40, 56
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    source = torch.stack([4 * column, 4 * row, 0 * row]).byte()
    flow = torch.stack([torch.full((height, width), 6.0), torch.full((height, width), -4.0)])
    frame = torch.stack([4 * (column + 6).clamp(0, 60), 4 * (row - 4).clamp(0, 60), 0 * row]).byte()
    hidden = (column > 20) & (column < 30)
    for name, image in (("f/0", frame), ("f/1", source), ("m/0", 255 * hidden.byte().expand(3, -1, -1))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_png(image, str(tmp_path / f"{name}.png"))
    (tmp_path / "w").mkdir()
    write_flow(tmp_path / "w" / "0.flo", flow)
    source_of = FrameSource(*(str(tmp_path / name) for name in "fwm"))
    assert source_of.count(1, 0) == 1
    data = FramePairs(source_of._pairs(), drawing(redraws=20, scale=(0.3, 1.0), mean=[0] * 3, std=[1] * 3), channels=3)
    compared = 0
    for epoch in range(10):
        view1, view2, unreadable, *_ = data[(epoch, 0)]
        assert view1.coords.shape == (3, 3)
        assert view2.coords.shape == (2, 32, 32)
        assert view1.source_size.tolist() == view2.source_size.tolist() == [height, width]
        place = view2.coords * torch.tensor([width, height]).view(2, 1, 1)
        shown = view2.image[:2].float()
        inner = (place.isfinite() & (place > 8) & (place < 30)).all(0)
        assert ((shown / 4 + 0.5 - place).abs().amax(0)[inner] < 1).all()
        compared += int(inner.sum())
        assert unreadable == 0
    assert compared > 500
    write_flow(tmp_path / "w" / "0.flo", flow[:, 1:])
    with pytest.raises(ValueError, match="none of which is whole"):
        data[(0, 0)]
    assert "is of another size" in caplog.text


# --- drawn moving scenes ----------------------------------------------------------------------------------------------


def test_the_drawn_flow_is_exact():
    """Where nothing hides it, a pixel shows the colour that the other frame shows where the flow leads."""
    for index in range(4):
        first, second, flow, visible = draw_frames(3, index, 96)
        x, y = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="xy")
        there = (torch.stack([x, y], -1) + flow.permute(1, 2, 0)) / 48 - 1
        seen = torch.nn.functional.grid_sample(second[None].float(), there[None], align_corners=False)[0]
        inside = (there.abs() < 1).all(-1)
        error = (seen - first.float()).abs().amax(0)
        assert error[visible & inside].median() < 12  # of 255: noise, and edges that fall between pixels
        assert error[visible & inside].float().mean() < 0.5 * error[~visible & inside].float().mean()
        assert 0.005 < (~visible).float().mean() < 0.4
        assert flow.abs().amax() > 4
    again = draw_frames(3, 3, 96)
    assert all(torch.equal(a, b) for a, b in zip(again, (first, second, flow, visible), strict=True))


def test_hidden_pixels_of_drawn_scenes_match_nothing():
    drawn = [draw_frames(5, index, 64) for index in range(3)]
    coords = coords_from_flow(torch.stack([d.flow for d in drawn]), torch.stack([d.visible for d in drawn]))
    other = torch.eye(3).expand(3, 3, 3)
    mask = DistanceMatcher(0.7, unit="query")(other, coords, (64, 64))
    matched = mask.any(1).view(3, 64, 64)
    hidden = ~torch.stack([d.visible for d in drawn])
    assert hidden.any()
    assert not matched[hidden].any()
    apart = cell_centers(other, (64, 64))[:, :, None] - cell_centers(coords, (64, 64))[:, None]
    distance = (apart[mask] * 64).norm(dim=-1)
    assert distance.max() < 0.7 * 2**0.5 + 1e-4


# --- the recipe -------------------------------------------------------------------------------------------------------


def options(moving: Path) -> list[str]:
    return ["--data.folder", str(moving / "frames"), "--data.flow", str(moving / "flow"), *TINY, "--data.size=32",
            "--data.batch_size=8", "--data.workers=0", "--data.scale=[0.4,1.0]", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]  # fmt: skip


@pytest.mark.parametrize(("method", "photometric"), [(PixProVideo, "device"), (PixProVideo, "cpu"), (PixPro, "none")])
def test_it_trains(method, photometric, moving, tmp_path):
    made = cli(method, *options(moving), "--trainer.max_epochs=2", f"--data.photometric={photometric}",
               "--trainer.log_every_n_steps=1", "--out", str(tmp_path))  # fmt: skip
    made.fit()
    assert made.trainer.global_step == 4
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "health/positives_per_cell" in rows[0]
    assert (tmp_path / "encoder.safetensors").exists()


def test_a_run_without_flow_or_with_segments_is_refused(tmp_path):
    options = ["--data.folder", "x", "--trainer.max_steps=1", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match=r"data.flow: expected a folder of optical flow, got none"):
        cli(PixProVideo, *options)
    with pytest.raises(ValueError, match=r"data.segments: expected none with data.flow, got grid"):
        cli(
            PixPro,
            "--data.folder",
            "x",
            "--data.flow=y",
            "--data.segments=grid",
            "--trainer.max_steps=1",
            "--out",
            str(tmp_path),
        )
    with pytest.raises(ValueError, match=r"data.occluded: expected data.flow with it, got y alone"):
        cli(PixPro, *options, "--data.occluded=y")


def test_the_command_line_names_bad_numbers(capsys):
    with pytest.raises(SystemExit):
        main(["unused", "--pairs", "0"])
    assert "expected at least 1" in capsys.readouterr().err


def test_the_recipe_is_short():
    path = Path(__file__).parents[2] / "examples" / "pretrain" / "pixpro_video.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
