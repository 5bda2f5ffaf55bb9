"""The command line on tiny folders and tiny models, without a network."""

import json
import logging
import os
import re
import signal

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2.functional import resize

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")

import evaluating
from evaluating import camvid_folder, resnet_file, scores_of

from densessl import FeatureMap
from densessl.checkpoints import load_backbone
from densessl.evaluation import FAST, _command, in_context_segmentation
from densessl.evaluation._backbones import features_of, make_backbone
from densessl.evaluation._command import main
from densessl.evaluation._protocols import PROTOCOLS as PROTOCOLS_OF_THE_COMMAND
from densessl.evaluation._report import table
from densessl.evaluation.data import camvid, resized

PROTOCOLS = "in-context-fast,neighbors,correspondence,tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return camvid_folder(tmp_path_factory.mktemp("camvid"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return resnet_file(tmp_path_factory.mktemp("weights") / "resnet18.pth")


def run(folder, weights, out, *options, protocols=PROTOCOLS):
    return evaluating.run(folder, weights, out, *options, protocols=protocols)


def test_the_command_gives_what_the_functions_give(folder, weights, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert run(folder, weights, out) == 0
    backbone = make_backbone(str(weights), layer="layer1")
    features = features_of(backbone, torch.device("cpu"))
    fit, test = (resized(camvid(folder, split), (64, 96)) for split in ("train", "test"))
    score = in_context_segmentation(features, fit, test, 11, FAST)
    content = json.loads(out.read_text())
    assert content["what"]["mean"] == [0.485, 0.456, 0.406]
    result = content["results"][f"in-context-fast on camvid:{folder}"]
    assert result["scores"] == {"mIoU": score}
    assert (result["images"], result["size"], result["settings"]["neighbors"]) == ([4, 3], [64, 96], 30)
    assert result["seconds"] >= 0
    assert content["what"]["layer"] == "layer1"
    assert content["how"]["versions"]["torch"] == torch.__version__.split("+")[0]
    printed = capsys.readouterr().out
    assert f"mIoU {score:.4f}" in printed
    assert "PCK within 1 cells" in printed
    assert "position R2" in printed


def test_the_normalisation_may_be_given(folder, weights, tmp_path):
    out = tmp_path / "results.json"
    assert run(folder, weights, out, "--mean", "0.5", "--std", "0.1,0.2,0.3", "--limit", "1", protocols="tokens") == 0
    what = json.loads(out.read_text())["what"]
    assert (what["mean"], what["std"]) == ([0.5] * 3, [0.1, 0.2, 0.3])


def test_random_weights_are_scored_with_the_statistics_of_the_images(folder, tmp_path):
    out, kept = tmp_path / "filled.json", tmp_path / "kept.json"
    base = ("--backbone", "torchvision/resnet18", "--weights", "none")
    assert run(folder, "ignored", out, *base, protocols="in-context-fast,correspondence") == 0
    assert run(folder, "ignored", kept, *base, "--fill-statistics", "0", protocols="in-context-fast") == 0
    assert "statistics from 256 images" in json.loads(out.read_text())["what"]["weights"]
    torch.manual_seed(0)
    backbone = make_backbone("torchvision/resnet18", "none", "layer1")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (backbone.mean, backbone.std))
    photos = camvid(folder, "train")
    images = torch.stack([(resize(image, [64, 96]).float() / 255 - mean) / std for image, _ in photos])
    backbone.model.train()
    for norm in (part for part in backbone.model.modules() if isinstance(part, torch.nn.BatchNorm2d)):
        norm.momentum = None
    with torch.no_grad():
        backbone.model(images)  # all four images at once
    backbone.model.eval()
    data = [resized(camvid(folder, split), (64, 96)) for split in ("train", "test")]
    features = features_of(backbone, torch.device("cpu"))
    expected = in_context_segmentation(features, *data, 11, FAST)
    found, unfilled = (scores_of(file)[f"in-context-fast on camvid:{folder}"]["mIoU"] for file in (out, kept))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != unfilled


def test_a_file_of_what_lies_before_the_cut_is_enough(folder, weights, tmp_path, capsys):
    cut = FeatureMap(torchvision.models.resnet18(), "layer2")
    load_backbone(cut, weights)
    torch.save(cut.state_dict(), tmp_path / "cut.pth")
    given = ["--backbone", "torchvision/resnet18", "--weights", str(tmp_path / "cut.pth")]
    assert run(folder, "ignored", tmp_path / "a.json", *given, protocols="neighbors") == 0
    assert run(folder, weights, tmp_path / "b.json", protocols="neighbors") == 0
    assert scores_of(tmp_path / "a.json") == scores_of(tmp_path / "b.json")
    assert run(folder, "ignored", tmp_path / "c.json", *given, "--layer", "layer3", protocols="neighbors") == 2
    assert re.search(
        r"error: --weights: .* does not fit --backbone torchvision/resnet18 cut after layer3: .*layer3",
        capsys.readouterr().err,
    )


def test_a_second_run_computes_only_what_is_missing(folder, weights, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    assert run(folder, weights, out, protocols="neighbors") == 0
    first = json.loads(out.read_text())
    first["results"][f"neighbors on camvid:{folder}"]["scores"]["mIoU"] = 9.0
    out.write_text(json.dumps(first))
    assert run(folder, weights, out, protocols="neighbors,in-context-fast") == 0
    made = scores_of(out)
    assert made[f"neighbors on camvid:{folder}"] == {"mIoU": 9.0}
    assert set(made) == {f"{name} on camvid:{folder}" for name in ("neighbors", "in-context-fast")}
    assert run(folder, weights, out, "--size", "32", protocols="neighbors") == 0
    assert scores_of(out)[f"neighbors on camvid:{folder}"]["mIoU"] < 1


def test_a_run_that_is_told_to_end_removes_its_features(folder, weights, tmp_path, monkeypatch, capsys):
    out, store, handler = tmp_path / "results.json", tmp_path / "store", signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(
        PROTOCOLS_OF_THE_COMMAND,
        "clusters",
        PROTOCOLS_OF_THE_COMMAND["clusters"]._replace(run=lambda job: os.kill(os.getpid(), signal.SIGTERM)),
    )
    assert run(folder, weights, out, "--store", str(store), protocols="neighbors,clusters") == 130
    assert "stopped: the same command goes on" in capsys.readouterr().err
    assert [*store.iterdir()] == []
    assert [*scores_of(out)] == [f"neighbors on camvid:{folder}"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_bars_count_the_images_of_each_protocol(folder, weights, tmp_path, capsys):
    assert run(folder, weights, tmp_path / "out.json", protocols="neighbors,capi") == 0
    told = capsys.readouterr().err
    assert "features of camvid train: 100%" in told
    assert "neighbors on camvid: 100%" in told
    assert "7/7" in told
    assert "capi on camvid: 7 images" in told


def test_a_run_that_fails_keeps_what_was_done(folder, weights, tmp_path, capsys):
    out = tmp_path / "results.json"
    empty = f"photos:{tmp_path / 'empty'}"
    (tmp_path / "empty").mkdir()
    assert run(folder, weights, out, "--data", empty, "--limit", "2", protocols="neighbors,tokens") == 2
    assert "found none" in capsys.readouterr().err
    assert set(scores_of(out)) == {f"{name} on camvid:{folder}" for name in ("neighbors", "tokens")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocols", "hummingbird,leopard"], "error: --protocols: expected some of hummingbird, "),
        (["--data", "voc"], "error: --data: expected KIND:FOLDER with KIND one of voc, "),
        (["--data", "voc:nowhere"], "error: folder: expected VOCdevkit/VOC2012"),
        (["--backbone", "timm/resnet18o"], "error: --backbone: timm knows no model 'resnet18o'; close: resnet18"),
        (["--backbone", "torchvision/resnet18o"], "error: --backbone: torchvision knows no model"),
        (["--backbone", "nothing"], "error: --backbone: expected timm/NAME, torchvision/NAME, hf/NAME or a file"),
        (
            ["--weights", "nothing.pth", "--backbone", "torchvision/resnet18"],
            "error: --weights: expected default",
        ),
        (["--size", "many"], "error: --size: expected N or HxW"),
        (["--layer", "layer9"], "error: --layer: "),
        (["--mean", "1,2"], "error: --mean: expected one number or three"),
        (["--std", "0"], "error: --std: expected one number or three"),
        (["--limit", "0"], "error: --limit: expected at least 1, got 0"),
        (["--fill-statistics", "-1"], "error: --fill-statistics: expected at least 0, got -1"),
        (["--device", "toaster"], "error: --device: toaster"),
        (["--test", "night"], "error: folder: expected images/night"),
    ],
)
def test_errors_are_told_in_a_line(folder, weights, tmp_path, capsys, options, message):
    given = ["--data", f"camvid:{folder}"] if "--data" not in options else []
    base = [
        "--backbone",
        str(weights),
        "--protocols",
        "neighbors",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "o.json"),
    ]
    assert main([*base, *given, *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.count("\n") == 1
    assert not (tmp_path / "o.json").exists()


def test_nothing_is_said_of_each_try_to_download(folder, weights, tmp_path, monkeypatch, capsys, caplog):
    def unreachable(*args):
        logging.getLogger("huggingface_hub").setLevel(logging.WARNING)  # as its first import does
        logging.getLogger("huggingface_hub.utils._http").warning("'Connection refused' thrown while requesting HEAD")
        raise OSError("no network")

    monkeypatch.setattr(_command, "make_backbone", unreachable)
    monkeypatch.setattr(logging.getLogger("huggingface_hub.utils._http"), "level", logging.NOTSET)
    options = ["--backbone", "timm/resnet18", "--data", f"camvid:{folder}", "--out", str(tmp_path / "r.json")]
    assert main([*options, "--protocols", "neighbors"]) == 2
    assert capsys.readouterr().err == "error: no network\n"
    assert not caplog.messages


def test_a_report_of_something_else_is_not_overwritten(folder, weights, tmp_path, capsys):
    out = tmp_path / "results.json"
    out.write_text('{"what": {"backbone": "other"}, "results": {}}')
    assert run(folder, weights, out) == 2
    assert "was made with backbone = 'other'" in capsys.readouterr().err
    out.write_text("nothing")
    assert run(folder, weights, out) == 2
    assert "is no report of this command" in capsys.readouterr().err


def test_videos_and_pairs(weights, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def draw(path, *shape):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy()).save(path)

    davis, spair = tmp_path / "DAVIS", tmp_path / "SPair-71k"
    for frame in range(4):
        draw(davis / f"JPEGImages/480p/bear/{frame:05}.jpg", 48, 70, 3)
        (davis / "Annotations/480p/bear").mkdir(parents=True, exist_ok=True)
        mask = torch.zeros(48, 70, dtype=torch.uint8)
        mask[10:30, 20 + frame : 50] = 1
        Image.fromarray(mask.numpy()).save(davis / f"Annotations/480p/bear/{frame:05}.png")
    (davis / "ImageSets/2017").mkdir(parents=True)
    (davis / "ImageSets/2017/val.txt").write_text("bear\n")
    entry = {"category": "cat", "src_imname": "1.jpg", "trg_imname": "2.jpg", "src_kps": [[3, 4], [30, 20]],
             "trg_kps": [[5, 6], [40, 30]], "trg_bndbox": [0, 0, 50, 40]}  # fmt: skip
    for number in (1, 2):
        draw(spair / f"JPEGImages/cat/{number}.jpg", 48, 60, 3)
    for part in ("Layout/large", "PairAnnotation/test"):
        (spair / part).mkdir(parents=True)
    (spair / "Layout/large/test.txt").write_text("1:cat\n")
    (spair / "PairAnnotation/test/1:cat.json").write_text(json.dumps(entry))
    out = tmp_path / "results.json"
    assert main(
        ["--backbone", str(weights), "--layer", "layer1", "--data", f"davis:{tmp_path}", "--data", f"spair:{tmp_path}",
         "--protocols", "davis,spair", "--size", "64", "--device", "cpu", "--out", str(out)]
    ) == 0  # fmt: skip
    made = scores_of(out)
    assert set(made[f"davis on davis:{tmp_path}"]) == {"J&F", "J", "F"}
    assert set(made[f"spair on spair:{tmp_path}"]) == {"PCK per image", "PCK per point"}


def test_models_of_timm_and_torchvision():
    timm = pytest.importorskip("timm")
    vit = make_backbone("timm/test_vit", "none")
    assert (vit.layer, vit.patch) == ("norm", (16, 16))
    assert vit.model(torch.zeros(1, 3, 32, 48)).shape[2:] == (2, 3)
    net = make_backbone("timm/test_efficientnet", "none")
    assert (net.mean, vit.mean) == tuple(
        timm.get_pretrained_cfg(f"test_{kind}").mean for kind in ("efficientnet", "vit")
    )
    assert net.model(torch.zeros(1, 3, 64, 96)).shape[2:] == (2, 3)
    for name, layer in (("mobilenet_v3_small", "features"), ("resnet18", "layer4"), ("vit_b_16", "encoder.ln")):
        with torch.device("meta"):
            assert make_backbone(f"torchvision/{name}", "none").layer == layer


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    backbone = make_backbone(str(tmp_path))
    assert backbone.layer == "layernorm"
    images = torch.rand(1, 3, 28, 42)
    with torch.no_grad():
        expected = model(images).last_hidden_state[:, 1:].mT.view(1, 16, 2, 3)
        torch.testing.assert_close(backbone.model(images), expected)
    assert make_backbone(f"hf/{tmp_path}", "none").layer == "layernorm"


def test_a_file_may_hold_the_weights_of_a_named_model(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    backbone = make_backbone("timm/test_vit", str(tmp_path / "vit.pth"), "blocks.0")
    assert torch.equal(backbone.model.state_dict()["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match=r"^--backbone: .*vit.pth alone does not tell .* --weights"):
        make_backbone(str(tmp_path / "vit.pth"))


def test_the_table_lines_up():
    result = {"protocol": "neighbors", "data": "voc:a", "scores": {"mIoU": 0.5}, "images": [1464, 1449]}
    result |= {"size": [448, 448], "seconds": 3.21}
    lines = table({"a": result, "b": result | {"protocol": "hummingbird-open", "size": [504, 504]}}).splitlines()
    assert lines[2].split("  ")[0] == "neighbors"
    assert "1,464 + 1,449" in lines[2]
    assert lines[2].index("voc:a") == lines[3].index("voc:a") == lines[0].index("data")
