"""The comparison of methods on tiny runs: rows are made once, and become a table."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.io import decode_image, write_jpeg, write_png

from benchmarks.performance import step
from benchmarks.studies import (
    bootstrap,
    collapse,
    compare,
    compare_cost,
    compare_figure,
    compare_report,
    compare_transfer,
    resumable,
    tuning,
    views,
)
from benchmarks.studies.arms import ARMS, BESIDE_THE_STUDY
from benchmarks.studies.rows import read_rows
from densessl.evaluation.matched import class_ious

TINY = [
    *("--steps=2", "--batch-size=4", "--size=40", "--images=8", "--probe-images=4", "--probe-steps=2", "--seeds=1"),
]
METHODS = [name for name in ARMS if name not in BESIDE_THE_STUDY]


@pytest.mark.filterwarnings("ignore")
def test_every_arm_makes_its_row_once_on_scenes(tmp_path, capsys, monkeypatch):
    command = [*TINY, "--lr=0.5", "--out", str(tmp_path)]
    text = compare.main(command)
    rows = read_rows(tmp_path / "rows.csv")
    assert [row["arm"] for row in rows] == METHODS
    assert {row["step"] for row in rows} == {"0", "2"}
    assert all(0 <= float(row[score]) <= 1 for row in rows for score in compare.SCORES)
    assert all(float(row["std"]) > 0 for row in rows if row["arm"] != "rate-0")
    for row in rows:
        assert (tmp_path / f"{row['arm']}-lr{float(row['lr']):g}-seed0-{row['step']}.safetensors").exists()
    monkeypatch.setattr(compare, "run_arm", lambda *args: pytest.fail("made a row that was there"))
    assert compare.main(command) == text
    assert compare.main([*command, "--report"]) == text


@pytest.mark.filterwarnings("ignore")
def test_arms_beside_the_study_make_rows_too(tmp_path):
    names = [name for name in BESIDE_THE_STUDY if name != "vit"]
    compare.main([*TINY, "--lr=0.001", f"--only={','.join(names)}", "--out", str(tmp_path)])
    assert [row["arm"] for row in read_rows(tmp_path / "rows.csv")] == names


@pytest.fixture
def folder(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    (tmp_path / "photos").mkdir()
    for index in range(8):
        write_jpeg(noise(3, 128, 140), str(tmp_path / "photos" / f"{index}.jpg"))
    for split in ("train", "val", "test"):
        for kind in ("images", "labels"):
            (tmp_path / "camvid" / kind / split).mkdir(parents=True)
        for index in range(2):
            write_jpeg(noise(3, 48, 64), str(tmp_path / "camvid" / "images" / split / f"{index}.jpg"))
            write_png(noise(1, 48, 64) % 12, str(tmp_path / "camvid" / "labels" / split / f"{index}.png"))
    return tmp_path


def test_the_rate_is_chosen_on_val_and_reported_on_test(folder, tmp_path):
    data = ["--photos", str(folder / "photos"), "--labelled", f"camvid={folder / 'camvid'}", "--out", str(tmp_path)]
    command = [*TINY, *data, "--only=rate-0,pixpro", "--snapshots=1"]
    with pytest.raises(ValueError, match="expected rows of --stage tune for pixpro first"):
        compare.main([*command, "--only=pixpro"])
    compare.main([*command, "--stage=tune", "--lrs=0.5,1"])
    tried = [row for row in read_rows(tmp_path / "rows.csv") if row["split"] == "val"]
    assert [(row["arm"], row["lr"], row["step"]) for row in tried] == [
        ("rate-0", "0.0000", "0"), ("pixpro", "0.5000", "1"), ("pixpro", "0.5000", "2"), ("pixpro", "1.0000", "1"),
        ("pixpro", "1.0000", "2")]  # fmt: skip
    assert {row["seed"] for row in tried} == {"100"}
    text = compare.main(command)
    best = max((row for row in tried if row["step"] == "2"), key=lambda row: float(row["linear"]))
    final = [row for row in read_rows(tmp_path / "rows.csv") if row["split"] == "test" and row["arm"] == "pixpro"]
    assert {row["lr"] for row in final} == {best["lr"]}
    assert "| camvid | PixPro | 2 |" in text
    assert "| camvid | learning rate 0 | 0 | 0 | 1 |" in text


def test_a_killed_run_goes_on_to_the_same_encoder_and_rows(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "SAVE_EVERY", 2)
    command = [*TINY, "--steps=5", "--snapshots=1,3", "--only=pixpro,pixcontrast", "--lr=1"]
    compare.main([*command, "--out", str(tmp_path / "whole")])
    made = compare.add_row

    def killed(path, columns, row):
        made(path, columns, row)
        if row["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare, "add_row", killed)
    for _ in range(2):  # once in each arm
        with pytest.raises(KeyboardInterrupt):
            compare.main([*command, "--out", str(tmp_path / "parts")])
    longer = [*command, "--out", str(tmp_path / "parts"), "--steps=6", "--only=pixcontrast"]
    with pytest.raises(ValueError, match=r"--steps: expected 5, with which rows .*, got 6"):
        compare.main(longer)
    rows = tmp_path / "parts" / "rows.csv"
    rows.rename(tmp_path / "rows.csv")  # as a run leaves the folder that is killed before its first row
    with pytest.raises(ValueError, match=r"steps: expected 5, .*pixcontrast-lr1-seed0.pt, got 6; remove"):
        compare.main(longer)
    with pytest.raises(ValueError, match=r"--batch-size: expected 4, as in the run whose state is .*, got 2; remove"):
        compare.main([*command, "--out", str(tmp_path / "parts"), "--batch-size=2", "--only=pixcontrast"])
    (tmp_path / "rows.csv").rename(rows)
    compare.main([*command, "--out", str(tmp_path / "parts")])
    of_both = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(tmp_path / out / "rows.csv")]
        for out in ("whole", "parts")
    ]
    assert of_both[0] == of_both[1]
    assert len(of_both[0]) == 6
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    assert not list((tmp_path / "parts").glob("*.pt"))


def test_kept_views_change_nothing_and_are_drawn_once(folder, tmp_path):
    command = [*TINY, "--steps=3", "--lr=1", "--bfloat16", "--photos", str(folder / "photos"), "--out"]
    compare.main([*command, str(tmp_path / "drawn"), "--only=pixpro,vicregl,detcon"])
    kept = [*command, str(tmp_path / "kept"), "--views", str(tmp_path / "views")]
    compare.main([*kept, "--only=pixpro"])
    (held,) = (tmp_path / "views").iterdir()
    (held / "1.safetensors").unlink()
    (held / "2.safetensors").write_bytes((held / "2.safetensors").read_bytes()[:1000])  # a full disk left it
    compare.main([*kept, "--only=pixpro", "--seeds=1", "--lr=2"])  # draws both again
    written = {path: path.stat().st_mtime_ns for path in held.iterdir()}
    assert len(written) == 3
    compare.main([*kept, "--only=rate-0"])  # its statistics are filled in float32
    compare.main([*command, str(tmp_path / "drawn"), "--only=rate-0"])
    compare.main([*kept, "--only=vicregl,detcon"])  # DetCon needs segments, which are not kept
    assert {path: path.stat().st_mtime_ns for path in held.iterdir()} == written
    compare.main([*kept[:-3], str(tmp_path / "other"), *kept[-2:], "--only=pixpro", "--batch-size=2"])
    assert len(list((tmp_path / "views").iterdir())) == 2  # views of another size are others
    compare.main([*kept, "--only=byol", "--out", str(tmp_path / "fewer"), "--images=7"])
    assert len(list((tmp_path / "views").iterdir())) == 3  # so are those of other photos
    for file in (tmp_path / "drawn").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "kept" / file.name).read_bytes()


def test_views_are_told_apart_by_photos_order_and_settings():
    photos = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    cases = ((photos, 64), (photos.clone(), 64), (photos.flip(0), 64), (photos.mT, 64), (photos[:2], 64), (photos, 32))
    keys = [views.views_key(*facts) for facts in cases]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def test_a_run_at_rate_0_moves_the_statistics_and_no_weight(folder, tmp_path, monkeypatch):
    scored, frozen_features = [], compare.frozen_features

    def seen(backbone, images):
        scored.append(int(backbone.get_buffer("bn1.num_batches_tracked")))
        return frozen_features(backbone, images)

    monkeypatch.setattr(compare, "frozen_features", seen)
    torch.manual_seed(0)
    before = compare.make_backbone().state_dict()
    compare.main([*TINY, "--only=rate-0", "--out", str(tmp_path)])
    from safetensors.torch import load_file

    assert set(scored) == {4}  # of 2 steps with 2 views each
    after = load_file(tmp_path / "rate-0-lr0-seed0-0.safetensors")
    for name, value in after.items():
        assert torch.equal(value, before[name]) == ("running" not in name and "num_batches" not in name), name


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--only=simclr", "got simclr"),
        ("--seeds=0", "--seeds: expected"),
        (
            "--labelled=voc=folder",
            "--labelled: expected NAME=FOLDER, NAME one of camvid, nuclei, scenes, got voc=folder",
        ),
        ("--labelled=camvid", "got camvid"),
        ("--lrs=0.00025,0.5", "--lrs: expected rates above 0 with at most 4 decimals, got 0.00025"),
        ("--lr=0", "--lr: expected rates above 0 with at most 4 decimals, got 0"),
    ],
)
def test_bad_options_are_named(option, message, capsys):
    with pytest.raises(SystemExit):
        compare.main([option])
    assert message in capsys.readouterr().err


def test_a_step_is_timed(capsys):
    step.main(["--backbone=resnet18", "--size=64", "--batch-size=2", "--steps=1", "--warmup=0"])
    assert "times faster" in capsys.readouterr().out


def test_the_collapse_differs_in_one_part(tmp_path, monkeypatch, capsys):
    options = ["--steps=2", "--images=4", "--batch-size=4", "--size=32", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["collapse.py", *options])
    collapse.main()
    assert "| without PPM |" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "collapse.csv")) == 2


def test_the_rate_is_chosen_at_the_full_length_alone():
    def row(lr, step, linear, split="val", arm="pixpro"):
        return {"arm": arm, "lr": lr, "step": step, "split": split, "linear": linear}

    rows = [row("0.5", "9", "0.6"), row("0.5", "3", "0.1"), row("1.0", "9", "0.5"), row("1.0", "3", "0.9")]
    rows += [row("1.0", "9", "0.99", "test"), row("1.0", "9", "0.99", arm="byol")]
    assert tuning.chosen_lr(rows, "pixpro", 9) == 0.5
    assert tuning.chosen_lr(rows, "pixpro", 3) == 1.0


@pytest.mark.parametrize("best", [0.125, 0.25, 0.5, 1.0, 2.0, 4.0])
def test_tuning_climbs_to_the_best_rate(best):
    lrs, scored = [0.125, 0.25, 0.5, 1.0, 2.0, 4.0], {}
    while (lr := tuning.next_lr(scored, lrs)) is not None:
        assert lr not in scored
        scored[lr] = -abs(lrs.index(lr) - lrs.index(best))
    assert max(scored, key=scored.get) == best
    assert list(scored)[:2] == [0.5, 1.0]
    assert len(scored) == {0.5: 3, 1.0: 3, 0.25: 4, 2.0: 4, 0.125: 4, 4.0: 4}[best]


def test_tuning_of_one_rate_or_three():
    assert tuning.next_lr({}, [1.0]) == 1.0
    assert tuning.next_lr({1.0: 0.5}, [1.0]) is None
    assert tuning.next_lr({}, [0.5, 1.0, 2.0]) == 1.0
    assert tuning.next_lr({1.0: 0.5, 0.5: 0.4}, [0.5, 1.0, 2.0]) == 2.0


def test_rates_tried_with_other_options_do_not_lead_the_search():
    assert tuning.next_lr({1.0: 0.5, 0.5: 0.7}, [0.25, 1.0, 2.0]) == 0.25
    assert tuning.next_lr({0.5: 0.7}, [1.0]) == 1.0


def test_a_rate_scored_on_fewer_sets_than_others_is_not_chosen():
    rows = [
        {"arm": "pixpro", "lr": "0.5000", "step": "9", "split": "val", "linear": of_set} for of_set in ("0.6", "0.2")
    ]
    unfinished = rows[0] | {"lr": "1.0000"}
    assert tuning.chosen_lr([*rows, unfinished], "pixpro", 9) == 0.5
    assert tuning.chosen_lr([unfinished], "pixpro", 9) == 1.0


def test_a_rate_scored_on_one_set_of_two_is_not_done():
    row = {"arm": "pixpro", "lr": "0.5000", "step": "9", "split": "val", "linear": "0.6"}
    assert tuning.val_scores([row], "pixpro", 9, sets=2) == {}
    assert tuning.val_scores([row, row | {"linear": "0.8"}], "pixpro", 9, sets=2) == {0.5: pytest.approx(0.7)}


def of_seeds(arm, *values, split="test", step="9"):
    return [
        {"arm": arm, "lr": "1.0", "seed": str(seed), "split": split, "step": step, "set": name, "linear": str(linear)}
        for seed, value in enumerate(values)
        for name, linear in (("camvid", value - 0.1), ("nuclei", value + 0.1))  # two labelled sets, whose mean counts
    ]


def test_the_primary_endpoint_is_paired_by_seed_against_the_better_instance_arm(tmp_path):
    rows = (
        of_seeds("pixpro", 0.32, 0.35, 0.33) + of_seeds("byol", 0.10, 0.12, 0.11) + of_seeds("infonce", 0.3, 0.31, 0.3)
    )
    assert compare_report.endpoints(rows, 9, tmp_path) == ""
    rows += of_seeds("pixpro+infonce", 0.305, 0.309, 0.302) + of_seeds("pixpro", 0.9, 0.9, 0.9, split="val")
    rows += of_seeds("pixpro", 0.9, 0.9, step="3")
    first, second = compare_report.endpoints(rows, 9, tmp_path).splitlines()[2:]
    # Differences 0.02, 0.04, 0.03: their deviation is 0.01, and t(0.975, 2) = 4.3027.
    assert first == "| PixPro - instance, InfoNCE form | 3 | +0.030 | +0.005 to +0.055 |  | ahead |"
    assert second.endswith("| level |")


def test_rows_of_unfinished_seeds_and_other_rates_stay_out_of_the_endpoint(tmp_path):
    arms = ("pixpro", "byol", "infonce", "pixpro+infonce")
    rows = [row for number, arm in enumerate(arms) for row in of_seeds(arm, 0.3 + 0.01 * number, 0.31, 0.33)]
    whole = compare_report.endpoints(rows, 9, tmp_path)
    unfinished = of_seeds("pixpro", 0, 0, 0, 0.9)[-1:]  # a fourth seed, scored on one set of two
    assert compare_report.endpoints([*rows, *unfinished], 9, tmp_path) == whole
    other = [row | {"lr": "2.0"} for row in of_seeds("pixpro", 0.8, 0.8, 0.8)]
    assert compare_report.endpoints([*rows, *other], 9, tmp_path) == ""  # nothing says which rate counts
    tuned = of_seeds("pixpro", 0.5, split="val") + [row | {"lr": "2.0"} for row in of_seeds("pixpro", 0.4, split="val")]
    assert compare_report.endpoints([*rows, *other, *tuned], 9, tmp_path) == whole
    scores = dict.fromkeys(compare_report.SCORES[1:], "0.5") | {"std": ""}
    table = compare_report.report([row | scores for row in rows + other])
    assert [line.split(" | ")[3] for line in table.splitlines() if "| PixPro | " in line] == ["1", "2"] * 2


def test_no_interval_over_images_where_the_arms_have_no_common_ones(tmp_path):
    arms = ("pixpro", "byol", "infonce", "pixpro+infonce")
    rows = [row for arm in arms for row in of_seeds(arm, 0.3, 0.31)]

    def keep(arm, images, sets=("camvid", "nuclei")):
        for seed, of_set in ((seed, of_set) for seed in (0, 1) for of_set in sets):
            file = tmp_path / f"{arm}-lr1-seed{seed}-9.safetensors"
            bootstrap.save_overlaps(torch.randint(1, 9, (images, 2, 2)), file, of_set)

    def intervals():
        return [line.split("|")[5].strip() for line in compare_report.endpoints(rows, 9, tmp_path).splitlines()[2:]]

    keep("pixpro", 3)
    keep("infonce", 3)
    keep("byol", 3)
    keep("pixpro+infonce", 3, ("camvid",))
    first, second = intervals()
    assert " to " in first
    assert second == ""  # a set is missing
    keep("pixpro+infonce", 4)
    assert intervals()[1] == ""  # other images
    keep("pixpro+infonce", 3)
    assert " to " in intervals()[1]


def test_the_bootstrap_draws_the_same_images_for_both_arms():
    def overlaps(*right: int) -> dict[str, torch.Tensor]:
        """Of images of 10 pixels of two classes in turns, so many of them answered rightly."""
        images = []
        for number, count in enumerate(right):
            image = torch.zeros(2, 2, dtype=torch.int32)
            image[number % 2, number % 2], image[number % 2, 1 - number % 2] = count, 10 - count
            images.append(image)
        return {"camvid": torch.stack(images)}

    better, worse = overlaps(9, 3, 8, 2, 9, 4), overlaps(7, 1, 6, 0, 7, 2)
    assert bootstrap.bootstrap([better], [better]) == (0, 0)
    low, high = bootstrap.bootstrap([better, worse], [worse, worse])
    generator, found = torch.Generator().manual_seed(0), []
    for drawn in torch.randint(6, (1000, 6), generator=generator).tolist():
        one, other = (sum(arm["camvid"][index] for index in drawn) for arm in (better, worse))
        found.append(float(class_ious(one.long()).nanmean() - class_ious(other.long()).nanmean()) / 2)
    found.sort()
    assert low == pytest.approx(found[24] * 0.025 + found[25] * 0.975, abs=1e-3)
    assert high == pytest.approx(found[974], abs=2e-3)
    assert 0 < low < high


@pytest.mark.filterwarnings("ignore")
def test_the_report_has_the_interval_over_images(tmp_path):
    arms = ("pixpro", "byol", "infonce", "pixpro+infonce")
    command = [*TINY, "--lr=1", f"--only={','.join(arms)}", "--seeds=2", "--out", str(tmp_path)]
    lines = [line for line in compare.main(command).splitlines() if line.startswith("| PixPro ")]
    low, high = map(float, lines[0].split("|")[5].split(" to "))
    assert -1 <= low <= high <= 1
    file = bootstrap.overlaps_file(compare.encoder_file(argparse.Namespace(out=tmp_path), "byol", 1.0, 1, 2), "scenes")
    row = next(r for r in read_rows(tmp_path / "rows.csv") if (r["arm"], r["seed"]) == ("byol", "1"))
    held = load_file(file)["overlaps"]
    assert len(held) == 4
    assert float(class_ious(held.sum(0)).nanmean()) == pytest.approx(float(row["linear"]), abs=1e-4)
    for path in tmp_path.glob("*-seed1-2-scenes.overlaps.safetensors"):
        path.unlink()
    assert "|  |" in compare.main([*command, "--report"])


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [(0.02, 0.01, "ahead"), (-0.02, 0.01, "behind"), (0.02, 0.03, "undecided"), (0.009, 0.001, "level")],
)
def test_words_of_the_endpoint(mean, half, word):
    assert compare_report.verdict(mean, half) == word
    assert compare_report.verdict(*compare_report.paired({0: 0.5}, {0: 0.3})[:2]) == "undecided"


def test_an_encoder_is_there_before_the_row_that_says_so(tmp_path, monkeypatch):
    def killed(path, columns, row):
        assert compare.encoder_file(argparse.Namespace(out=tmp_path), "rate-0", 0.0, 0, 0).is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "add_row", killed)
    with pytest.raises(KeyboardInterrupt):
        compare.main([*TINY, "--only=rate-0", "--out", str(tmp_path)])


def test_rows_of_another_share_or_rate_are_lines_of_their_own():
    rows = [
        {"arm": "pixpro", "lr": lr, "seed": seed, "set": "camvid", "share": share, "miou": miou}
        for seed in ("0", "1")
        for lr, share, miou in (("0.5", "0.1000", "0.2"), ("0.5", "1.0000", "0.6"), ("1.0", "1.0000", "0.4"))
    ]
    assert compare_transfer.report(rows).splitlines()[2:] == [
        "| camvid | PixPro | 0.5 | 2 | 10% | 0.200 ± 0.000 |",
        "| camvid | PixPro | 0.5 | 2 | 100% | 0.600 ± 0.000 |",
        "| camvid | PixPro | 1 | 2 | 100% | 0.400 ± 0.000 |",
    ]


@pytest.mark.filterwarnings("ignore")
def test_encoders_of_the_final_runs_are_fine_tuned_once(folder, tmp_path, monkeypatch):
    data = ["--photos", str(folder / "photos"), "--labelled", f"camvid={folder / 'camvid'}", "--out", str(tmp_path)]
    command = [*TINY, *data, "--only=rate-0,pixpro", "--lr=0.5"]
    with pytest.raises(ValueError, match=r"--out: expected rate-0-lr0-seed0-0.safetensors, which compare.py writes"):
        compare_transfer.main(command)
    compare.main(command)
    command = [*command, "--tune-steps=2"]
    text = compare_transfer.main(command)
    rows = read_rows(tmp_path / "transfer.csv")
    assert [(row["arm"], row["lr"], row["step"], row["share"]) for row in rows] == [
        ("rate-0", "0.0000", "0", "0.1000"), ("pixpro", "0.5000", "2", "0.1000")]  # fmt: skip
    assert f"| camvid | PixPro | 0.5 | 1 | 10% | {float(rows[1]['miou']):.3f} |" in text
    monkeypatch.setattr(compare_transfer, "fine_tuned_miou", lambda *args, **options: pytest.fail("made again"))
    assert compare_transfer.main(command) == text
    with pytest.raises(ValueError, match=r"--tune-lr: expected 0.001, with which rows .*, got 0.01"):
        compare_transfer.main([*command, "--tune-lr=0.01"])
    with pytest.raises(ValueError, match=r"--batch-size: expected 4, with which rows in .*rows.csv were made, got 8"):
        compare_transfer.main([*command, "--batch-size=8"])  # the encoders were not trained with these options
    with pytest.raises(ValueError, match=r"--batch-size: expected 4, with which rows .*, got 8"):
        compare.main([*command[:-1], "--batch-size=8"])


def test_the_figure_has_a_panel_for_each_set_and_score(tmp_path):
    rows = [
        {"arm": arm, "seed": str(seed), "step": step, "split": "test", "set": of_set}
        | {score: str(0.1 * seed + int(step) / 9000) for score in compare.SCORES}
        for of_set in ("camvid", "nuclei")
        for arm, steps in (("rate-0", ["0"]), ("pixpro", ["500", "2500"]), ("infonce", ["500", "2500"]))
        for step in steps
        for seed in (0, 1)
    ]
    compare_figure.draw(rows, tmp_path / "study.png")
    assert decode_image(str(tmp_path / "study.png")).shape[1:] == (960, 1800)


def test_scores_after_equal_time_lie_between_the_snapshots():
    def rows(arm, *scores):
        """At steps 4 and 8."""
        facts = dict.fromkeys(compare.COLUMNS, "") | {"arm": arm, "lr": "1.0", "seed": "0", "split": "test"}
        return [
            facts | {"set": "camvid", "step": str(step)} | dict.fromkeys(compare.SCORES, str(score))
            for step, score in zip((4, 8), scores, strict=True)
        ]

    both = rows("infonce", 0.2, 0.3) + rows("pixpro", 0.1, 0.5)
    found = compare_cost.after_equal_time(both, {"infonce": 0.3, "pixpro": 0.4}, 8)
    # The cheapest arm is done after 2.4 s, when PixPro has taken 6 steps, half way between its snapshots.
    assert [(row["arm"], float(row["linear"])) for row in found] == [("infonce", 0.3), ("pixpro", pytest.approx(0.3))]
    assert compare_cost.after_equal_time(both, {"infonce": 0.1, "pixpro": 0.4}, 8)[1:] == []  # at 2 steps: no snapshot
    assert {row["step"] for row in found} == {"8"}


def test_a_step_of_each_arm_has_its_cost(tmp_path):
    with pytest.raises(ValueError, match=r"--out: expected cost.csv"):
        compare_cost.main([*TINY, "--report", "--out", str(tmp_path)])
    text = compare_cost.main([*TINY, "--rounds=1", "--only=rate-0,byol,pixpro", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "cost.csv")
    assert [row["arm"] for row in rows] == ["byol", "pixpro"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert "| PixPro | " in text
