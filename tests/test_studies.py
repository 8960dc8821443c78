"""Studies: the agents are those announced, result files round-trip, the command line answers."""

import json

import numpy as np
import pytest

from eqgen import studies
from eqgen.algorithms.sac import SAC
from eqgen.studies import Study


STUDY = Study(
    "gymnax/Pendulum-v1",
    "smoke",
    (3, 5),
    {"sac": SAC(discount=0.9), "slow": SAC()},
    loop=dict(total_steps=200, eval_every=100),
    common=dict(hidden=(8,)),
)


def records(path, rows):
    path.write_text(
        json.dumps({"records": [dict(zip(("seed", "env_step", "eval/return"), r)) for r in rows]})
    )
    return path


def test_agents_take_the_size_and_then_what_is_common():
    agent = STUDY.agent("sac")
    assert (agent.discount, agent.hidden) == (0.9, (8,))
    assert (STUDY.settings.total_steps, STUDY.settings.batch_size) == (200, 32)


def test_run_leaves_one_result_file_and_a_second_run_the_same(tmp_path):
    places = dict(folder=tmp_path / "runs", results=tmp_path)
    path = studies.run_study(STUDY, "small", "sac", **places)
    content = json.loads(path.read_text())
    assert path.name == "small_sac.json"
    assert content["settings"]["seeds"] == [3, 5] and "packages" in content["provenance"][0]
    steps, returns = studies.read_curve(path)
    assert steps.tolist() == [0, 100, 200] and returns.shape == (2, 3)
    again = studies.run_study(STUDY, "small", "sac", **places)
    assert json.loads(again.read_text())["records"] == content["records"]


def test_curves_are_sorted_by_seed_and_step(tmp_path):
    path = records(tmp_path / "a.json", [(1, 20, 4.0), (0, 20, 3.0), (1, 10, 2.0), (0, 10, 1.0)])
    steps, returns = studies.read_curve(path)
    np.testing.assert_array_equal(steps, [10, 20])
    np.testing.assert_array_equal(returns, [[1.0, 3.0], [2.0, 4.0]])


def test_seeds_of_another_file_join_the_curve_as_far_as_all_have_come(tmp_path):
    path = records(tmp_path / "a.json", [(0, 10, 1.0), (0, 20, 3.0)])
    records(tmp_path / "a_seeds-1-2.json", [(1, 10, 2.0), (2, 10, 5.0), (1, 20, 4.0)])
    records(tmp_path / "a_other.json", [(7, 10, 0.0)])
    steps, returns = studies.read_curve(path)
    assert steps.tolist() == [10] and returns.tolist() == [[1.0], [2.0], [5.0]]


def test_other_seeds_have_their_own_run_and_file(tmp_path):
    places = dict(folder=tmp_path / "runs", results=tmp_path)
    path = studies.run_study(STUDY, "small", "sac", seeds=(8,), **places)
    assert path.name == "small_sac_seeds-8.json" and (tmp_path / "runs" / "small_sac_seeds-8").is_dir()
    assert json.loads(path.read_text())["settings"]["seeds"] == [8]


def test_ablation_changes_fields_after_the_size_and_what_is_common():
    study = STUDY.ablation(SAC(discount=0.9), {"base": {}, "wide": dict(hidden=(9, 9))}, seeds=(1,))
    assert study.seeds == (1,) and list(study.agents) == ["base", "wide"]
    assert (study.agent("base").hidden, study.agent("wide").hidden) == ((8,), (9, 9))
    assert study.agent("wide").discount == 0.9


def test_figure_leaves_out_what_has_no_result(tmp_path):
    path = records(tmp_path / "a.json", [(0, 10, 1.0), (0, 20, 2.0)])
    looks = {"A": dict(color="k"), "B": dict(color="r")}
    panels = {"one": {"A": path, "B": tmp_path / "none.json"}, "two": {"B": tmp_path / "none.json"}}
    written = studies.draw_curves(panels, looks, tmp_path / "figure")
    assert sorted(file.suffix for file in written) == [".pdf", ".png"]
    with pytest.raises(FileNotFoundError, match="no result to draw"):
        studies.draw_curves({"two": panels["two"]}, looks, tmp_path / "figure")


def test_command_line(tmp_path, capsys):
    call = lambda *argv: studies.main({"small": STUDY}, folder=tmp_path, results=tmp_path, argv=argv)
    call()
    assert "small: gymnax/Pendulum-v1, 200 steps, seeds (3, 5): sac, slow" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call("small", "--only", "ppo")
    assert "no agent 'ppo'; it has sac, slow" in capsys.readouterr().err
