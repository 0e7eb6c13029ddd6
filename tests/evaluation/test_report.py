"Every table and figure of the paper has a file and a place in the report, and every number there comes from a metrics file."

import csv, functools, html, json, re
from html.parser import HTMLParser
from pathlib import Path
import numpy as np, pytest
from fake_run import METHODS, fake_run, smoke_config
from fields.comparison import find, read_metrics
from fields.evaluation.claims import BAR, ablation, below, claim_verdict
from fields.evaluation.counts import count_data
from fields.evaluation.seeds import merge_seeds, seed_record
from fields.evaluation.emotion import evaluate_emotion
from fields.evaluation.figures import FIGURES, make_figures
from fields.evaluation.paper import paper_tables
from fields.evaluation.surfaces import evaluate_geometry
from fields.evaluation.limits import evaluate_limits
from fields.evaluation.parameters import evaluate_parameters
from fields.evaluation.conclusion import conclusion_html
from fields.evaluation.formats import source_id
from fields.evaluation.report import SECTIONS, TABLES, claims_html, make_report
from fields.evaluation.tables import all_tables, make_tables
from fields.viz import save_figure

ROOT = Path(__file__).parents[2]


def quick_map(features, kind, seed=0):
    "Two principal components in the place of t-SNE and UMAP, which a slow test runs."
    x = features - features.mean(0)
    return x @ np.linalg.svd(x, full_matrices=False)[2][:2].T


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A whole evaluation of an invented run."
    patch = pytest.MonkeyPatch()
    patch.setattr("fields.evaluation.maps.embed", quick_map)
    patch.setattr("fields.evaluation.figures.save_figure", lambda fig, path, dpi: save_figure(fig, path, 50))
    run, head = fake_run(
        tmp_path_factory.mktemp("report") / "run",
        heldout=8,
        frames=1,
        train=70,
        methods=("F0", "F1", "F2", "F4", "lambda10"),
    )
    config, methods = (
        smoke_config(**{"evaluation.probe_epochs": 3, "evaluation.probe_width": 24}),
        ["F0", "F1", "F2", "F4", "lambda10"],
    )
    evaluate_emotion(run, config, methods, head)
    evaluate_parameters(run, config, methods, head)
    evaluate_geometry(run, config, ["F1", "F4"], head)
    evaluate_limits(run, config, head)
    (run / "metrics" / "landmarks.json").write_text(
        json.dumps(
            {
                "affectnet_val": {
                    "F4": {
                        k: dict(mean=0.05, std=None, ci_low=0.04, ci_high=0.06, n=9)
                        for k in ("network", "mean_head_network_pose", "mean_head_fitted_pose", "ratio_to_mean_head")
                    }
                }
            }
        )
    )
    (run / "metrics" / "standins.json").write_text(json.dumps({"identity": {"error": 0.25}}))
    ablation(run)
    make_tables(run)
    figures = make_figures(run, config, head)
    yield run, figures, make_report(run).read_text()
    patch.undo()


class Page(HTMLParser):
    "Collects ids, links, pictures and the numbers of a page."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.numbers, self.tags, self.open = set(), [], [], [], set(), None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.tags.add(tag)
        if "id" in a:
            self.ids.add(a["id"])
        if "src" in a:
            self.sources.append(a["src"])
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
            self.open = (a, "") if "data-from" in a else None

    def handle_data(self, data):
        if self.open:
            self.open = (self.open[0], self.open[1] + data)

    def handle_endtag(self, tag):
        if tag == "a" and self.open:
            self.numbers.append(self.open)
            self.open = None


def test_every_number_of_the_paper_has_a_place(done):
    run, figures, text = done
    page = Page(text)
    assert sorted(e.number for e in TABLES if e.number.startswith("Table")) == [f"Table {n}" for n in range(1, 9)]
    assert [e.number for e in FIGURES if e.number] == [f"Figure {n}" for n in range(1, 16)]
    missing = json.loads((run / "figures" / "missing.json").read_text())
    assert set(missing) == {"figure10"} and "raw BP4D scan" in missing["figure10"]  # the invented run has no raw scans
    for e in TABLES:
        assert (
            e.key in page.ids
            and (run / "tables" / f"{e.key}.csv").is_file()
            and (run / "tables" / f"{e.key}.tex").is_file()
        )
    for e in FIGURES:
        assert e.key in page.ids
        assert (run / "figures" / f"{e.key}.png").is_file() != (e.key in missing)
    assert {s for s, _ in SECTIONS} <= page.ids
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids, link


def test_the_page_is_alone(done):
    page = Page(done[2])
    assert not page.tags & {"script", "link", "iframe", "object"} and "http" not in done[2]
    assert all(s.startswith("data:image/png;base64,") for s in page.sources) and len(page.sources) == len(FIGURES) - 1
    for link in page.links:
        if not link.startswith(("#", "notebooks/")):
            assert (done[0] / link).is_file(), link
    assert len(done[2]) < 12e6


def test_every_number_is_that_of_its_file(done):
    run, _, text = done
    page, checked, read = Page(text), 0, functools.cache(read_metrics)
    for a, shown in page.numbers:
        name, trail = a["data-from"].split(":", 1)
        folder = "timing" if a["class"] == "time" else "metrics"
        assert a["href"] == (f"timing/{name}" if folder == "timing" else f"#{source_id(a['data-from'])}")
        value = find(read(run / folder / name), trail)
        if isinstance(value, dict):
            value = value["mean"]
        places = len(shown.partition(".")[2])
        if folder == "timing":
            assert shown == f"{value:,.4g}", a
        else:
            assert float(shown) == pytest.approx(value * float(a["data-scale"]), abs=0.51 * 10**-places), (
                a,
                shown,
                value,
            )
        checked += 1
    assert checked > 400


def test_cells_hold_only_linked_numbers(done):
    "A number of this run outside a link would have no origin."
    cells = re.findall(r'<td class="(?:run|side)"[^>]*>(.*?)</td>', done[2])
    assert len(cells) > 400
    for cell in cells:
        rest = re.sub(r"<i>.*?</i>|<small>.*?</small>|<a .*?</a>|±\s*[\d.]+", "", cell)
        assert not re.search(r"\d", html.unescape(re.sub(r"<.*?>", "", rest))), cell


def test_the_paper_is_printed_as_printed(done):
    tables = all_tables(done[0])
    table, paper = tables["table4"], paper_tables()["table4_ablation"]
    columns = [n for n, (m, s) in enumerate(table.columns) if s == "paper"]
    rows = {label: cells for label, cells in table.rows if cells}
    assert [rows["Accuracy (%) ↑"][c].show() for c in columns] == [f"{e['accuracy'][0]:.1f}" for e in paper.values()]
    assert [float(rows["{ψ, jaw} MSE, 53 numbers ↓"][c].show()) for c in columns] == [
        e["expression_jaw"] for e in paper.values()
    ]
    assert [float(rows["V-CCC ↑"][c].show()) for c in columns] == [e["V-CCC"][0] for e in paper.values()]
    for key in (f"table{n}" for n in range(1, 9)):
        sources = [s for _, s in tables[key].columns]
        assert "paper" in sources and "this run" in sources and ("oracle", "this run") in tables[key].columns


def test_packaged_tables_are_the_papers():
    tables = paper_tables()
    assert len(tables) == 9 and tables["table1_valence_arousal"]["FIELDS"]["V-PCC"] == [0.747, 0.003]
    assert tables["table4_ablation"]["F4 F2+F3"] == {**tables["table5_lambda_emo"][5]}
    assert (
        tables["table3_flame_mse"]["EMOCA"]["shape"] is None
        and tables["table6_geometry_units_inconsistent"]["EMOCA"]["AUC@0.1"] == 0.001
    )


def test_best_is_the_best_of_this_run(done):
    table = all_tables(done[0])["table3"]
    for label, cells in table.rows:
        runs = [
            c
            for c, (m, s) in zip(cells, table.columns)
            if s == "this run" and m not in ("oracle", "constant") and c.mean is not None
        ]
        if len(runs) > 1:
            assert [c.best for c in runs] == [c.mean == min(r.mean for r in runs) for c in runs], label


def test_csv_and_latex(done):
    run = done[0]
    rows = list(csv.DictReader(open(run / "tables" / "table4.csv", encoding="utf-8")))
    mine = [r for r in rows if r["source"] == "this run"]
    assert {"mean", "std", "ci_low", "ci_high", "n", "from"} <= set(rows[0]) and all(
        r["from"] and r["ci_low"] for r in mine
    )
    for r in mine[:40]:
        name, trail = r["from"].split(":", 1)
        record, scale = find(read_metrics(run / "metrics" / name), trail), 100 if "%" in r["measure"] else 1
        assert float(r["mean"]) == pytest.approx(record["mean"] * scale, rel=1e-4)
    for path in (run / "tables").glob("*.tex"):
        text = path.read_text()
        body = [l for l in text.splitlines() if l.endswith(r"\\") and "multicolumn" not in l]
        columns = len(re.search(r"begin\{tabular\}\{(\w+)\}", text)[1])
        assert all(l.count(" & ") == columns - 1 for l in body) and text.count("{") == text.count("}"), path.name
        assert text.isascii(), path.name


def test_world_and_profile_are_said(done):
    text = done[2]
    assert (
        "Demo world" in text
        and "never results of the paper" in text
        and "<b>smoke</b>" in text
        and "learned next to nothing" in text
    )


def test_sanity_of_the_run(done):
    "On held-out images the oracle is at or above every method; controls are at chance."
    checks = read_metrics(done[0] / "metrics" / "ablation.json")["sanity"]
    assert {r["key"] for r in checks} >= {"oracle-F0", "oracle-F4", "shuffled accuracy", "shuffled V-CCC"}
    assert all(r["verdict"] == "confirmed" for r in checks if r["key"] in ("oracle-F0", "oracle-F2")), (
        checks
    )  # the others exaggerate, which a probe of three epochs likes


def screen(**ablation):
    "The first screen of a report with these claims and results."
    return conclusion_html({"ablation": ablation}, {"profile": "demo"})


def card_of(text, kind):
    "One box of the first screen."
    return re.search(rf'<div class="card {kind}">(.*?)</div>', text, re.S)[1]


def test_what_does_not_hold_is_said_loudly(done):
    claims = read_metrics(done[0] / "metrics" / "ablation.json")["claims"]
    row = next(r for r in claims if r["key"] == "F2<F1")
    assert row["verdict"] == "confirmed"
    said = screen(claims=[row])
    assert row["sentence"].split("(")[0] in card_of(said, "good") and "<li>" not in card_of(said, "bad")
    record = row["record"]
    ends = {"mean": -record["mean"], "ci_low": -record["ci_high"], "ci_high": -record["ci_low"]}
    turned = row | {"record": record | ends}
    turned["verdict"] = claim_verdict(turned["record"], "lower")
    assert turned["verdict"] == "contradicted" and "<li>" in card_of(screen(claims=[turned]), "bad")
    assert "<li>" in card_of(screen(claims=[row | {"verdict": "not resolved"}]), "open")


def test_every_result_against_the_method_is_on_the_first_screen(done):
    """Each resolved difference that is worse for a part of the method stands in the red box with its number."""
    run, _, text = done
    box = card_of(text, "bad")
    named = 0
    for file, root in (("emotion", "protocols/heldout/differences"), ("parameters", "differences")):
        better = {"accuracy": 1, "f1": 1, "V-CCC": 1, "A-CCC": 1, "expression_jaw": -1, "shape": -1}
        for pair, records in find(read_metrics(run / "metrics" / f"{file}.json"), root).items():
            if not pair.startswith(("F2", "F3", "F4", "lambda")):
                continue
            for measure, sign in better.items():
                record = records.get(measure)
                if record and record["resolved"] and record["mean"] * sign < 0:
                    assert f'data-from="{file}.json:{root}/{pair}/{measure}"' in box, (pair, measure)
                    named += 1
    assert named, "the invented run has results against the method"


def test_the_conclusion_comes_first(done):
    text = done[2]
    places = [text.index(word) for word in ('id="verdict"', "<nav>", 'id="claims"', "the loss falls", 'id="sources"')]
    assert places == sorted(places)
    assert text.index("claims of the paper</th>") < text.index("training is training</th>")


def test_links_open_the_place(done):
    """Every linked number has a line of its own in the page that says file, keys and value."""
    run, _, text = done
    page = Page(text)
    for a, _ in page.numbers:
        if a["class"] == "num":
            assert a["href"][1:] in page.ids, a["data-from"]
    trails = {a["data-from"] for a, _ in page.numbers if a["class"] == "num"}
    assert len({source_id(trail) for trail in trails}) == len(trails)
    assert "None" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)


def test_lists_for_looking_up_are_folded(done):
    for heading in ("standins: 1 values", "metrics: ", "other times"):
        at = done[2].index(heading)
        assert done[2][:at].rstrip().rsplit("<", 1)[1].startswith("summary"), heading


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_page(done, tmp_path, width):
    """In headless Chromium, folded parts open: no table, picture or line sticks out; the conclusion is one screen."""
    from report_browser import CHROMIUM, measure_page, picture_of

    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    found = measure_page(done[0] / "report.html", tmp_path, width)
    assert found["view"] == width and found["page"] <= width and found["wide"] == []
    if width == 1280:
        assert found["verdict"] < 900
    artefacts = ROOT / "runs" / "screenshots"
    artefacts.mkdir(parents=True, exist_ok=True)
    picture = picture_of(done[0] / "report.html", tmp_path, width)
    (artefacts / f"report_{width}.png").write_bytes(picture.read_bytes())


def test_training_is_checked_and_said(done):
    """Losses, points against the mean head (pose refitted beside it), and F4 against F1 (the constant predictor beside it) stand in the report, loudly where they do not hold."""
    run, _, text = done
    rows = {r["key"]: r for r in read_metrics(run / "metrics" / "ablation.json")["training"]}
    losses = read_metrics(run / "metrics" / "training.json")["losses"]
    with open(run / "checkpoints" / "F1" / "log.csv") as file:
        logged = np.array([float(r["encoder.objective"]) for r in csv.DictReader(file)])
    assert losses["F1"]["encoder.objective"]["change"]["mean"] == pytest.approx(
        logged[-3:].mean() / logged[:3].mean() - 1, rel=1e-4
    )
    assert rows["F1 encoder.objective"]["verdict"] == "confirmed"
    errors = read_metrics(run / "metrics" / "parameters.json")
    assert rows["F4<F1"]["verdict"] == "confirmed" and [b["label"] for b in rows["F4<F1"]["beside"]] == [
        "F4",
        "F1",
        "constant predictor",
    ]
    assert rows["F4<F1"]["beside"][2]["record"] == errors["controls"]["constant"]["errors"]["expression_jaw"]
    points = rows["points affectnet_val"]
    assert (
        points["verdict"] == "confirmed"
        and points["beside"][2]["label"] == "mean head, pose refitted"
        and "beside it" in text
    )
    assert rows["points bp4d_test"]["verdict"] == "not measured"  # the invented run has no such file
    missed = points | {"verdict": below({"mean": 0.9, "ci_low": 0.8, "ci_high": 0.95}, BAR)}
    said = claims_html({"training": [missed]})
    assert ">NO<" in said and "mean head, pose refitted" in said and ">NO<" not in claims_html({"training": [points]})
    assert f"{points['beside'][2]['record']['mean'] * 100:.2f}" in said


def test_data_is_counted(done):
    data = read_metrics(done[0] / "metrics" / "data.json")
    assert data["bp4d_split"]["test"]["subjects"] == 6 and set(data["bp4d_split"]["test"]["share"].values()) == {
        0.166667
    }
    assert data["datasets"]["affectnet"]["rows"] == 126 and set(data["datasets"]) == {
        "affectnet",
        "bp4d",
        "celeba",
        "ffhq",
        "lrw",
        "mead",
    }


def test_equal_inputs_give_an_equal_page(done):
    run, _, text = done
    assert make_report(run).read_text() == text


def test_seeds(done):
    record = seed_record(done[0])
    assert (
        "emotion/F4/accuracy" in record["values"] and "parameters/F2-F1/errors/expression_jaw" in record["differences"]
    )
    merged = merge_seeds([record, record, record])
    assert merged["seeds"] == 3 and merged["values"]["emotion/F4/accuracy"]["std"] == 0
    assert merged["differences"]["parameters/F2-F1/errors/expression_jaw"]["resolved"]


def test_seeds_are_merged_from_files(done, tmp_path):
    from fields.evaluation.seeds import merge_files
    from shutil import copytree

    runs = [tmp_path / f"s{k}" for k in range(2)]
    for k, run in enumerate(runs):
        copytree(done[0] / "metrics", run / "metrics")
        (run / "config.json").write_text(json.dumps(json.loads((done[0] / "config.json").read_text()) | {"seed": k}))
    table = merge_files(runs, tmp_path / "out")
    assert "| F4 |" in table and "| constant |" in table and "± 0.0" in table
    assert (
        json.loads((tmp_path / "out" / "study.json").read_text())["seeds"] == 2
        and (tmp_path / "out" / "study_seed1.json").is_file()
    )
    with pytest.raises(ValueError, match="different seeds"):
        merge_files([runs[0], runs[0]], tmp_path / "x")
    (runs[1] / "config.json").write_text(
        json.dumps(json.loads((runs[1] / "config.json").read_text()) | {"profile": "other"})
    )
    with pytest.raises(ValueError, match="differs from the first run's in profile"):
        merge_files(runs, tmp_path / "x")


def test_figures_say_what_their_axes_are(done):
    from fields.evaluation.curves import figure_curves
    from fields.evaluation.known import read_all
    from fields.evaluation.plots import figure2, figure5, figure_naturalness

    run = done[0]
    for fig in (figure2(run), figure5(read_all(run)), figure_curves(run), figure_naturalness(read_all(run))):
        assert any(ax.get_xlabel() or ax.get_xticklabels() for ax in fig.axes) and any(
            ax.get_ylabel() for ax in fig.axes
        )
        assert (
            min(t.get_fontsize() for ax in fig.axes for t in [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()])
            >= 7
        )


def test_class_colours_differ_for_the_colour_blind():
    "Simulated deuteranopia and protanopia keep the seven classes apart, in colour or in marker."
    from fields.evaluation.colors import CLASS_STYLE

    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c, _ in CLASS_STYLE.values()]) ** 2.2
    for matrix in (
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    ):
        seen = (rgb @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 9 * np.eye(7)
        assert distance.min() > 0.08
    assert len({m for _, m in CLASS_STYLE.values()}) == 7
