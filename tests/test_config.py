import pytest

from r1_cluster.config import ConfigError, load_service

GOOD = "name: tiny\nmodel: {path: model}\n"


def load(tmp_path, text):
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model/config.json").write_text("{}")
    file = tmp_path / "service.yaml"
    file.write_text(text)
    return load_service(file)


def test_defaults_are_deepseeks_advice(tmp_path):
    service = load(tmp_path, GOOD)
    assert (service.serve.defaults.temperature, service.serve.defaults.top_p) == (0.6, 0.95)
    assert service.serve.defaults.max_tokens == 32768
    assert service.served_name == "tiny"
    assert service.model.path == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "layout: {stagess: 2}", "layout.stagess: is not a known key"),
        (GOOD + "colour: red", "colour: is not a known key"),
        ("name: tiny", "model: is required"),
        (GOOD + "engine: {num_pages: many}", "engine.num_pages: Input should be a valid integer"),
        (GOOD + "engine: {num_pages: true}", "engine.num_pages: Input should be a valid integer"),
        (
            GOOD + "engine: {max_num_seqs: 0}",
            "engine.max_num_seqs: Input should be greater than or equal to 1",
        ),
        (GOOD + "serve: {port: 70000}", "serve.port: Input should be less than or equal to 65535"),
        (
            GOOD + "layout: {kind: scattered}",
            "layout.kind: Input should be 'colocated', 'disaggregated' or 'expert-parallel'",
        ),
        (GOOD + "cluster: {link_ports: [9, 5]}", "link_ports must be two ports, low then high"),
        (GOOD + "engine: {kv_cache_dtype: int8}", "engine.kv_cache_dtype: Input should be 'fp8'"),
        (GOOD + "engine: {kv_cache_dtype: true}", "engine.kv_cache_dtype: Input should be 'fp8'"),
        (
            GOOD + "layout: {device: npu}\nengine: {kv_cache_dtype: fp8}",
            "engine.kv_cache_dtype: fp8 is for the CPU and GPUs; layout.device: npu has no FP8",
        ),
        ("name: a\nmodel: {path: model, kv_cache_dtype: fp8}", "model.kv_cache_dtype: is not a known key"),
        ("name: Not A Name\nmodel: {path: model}", "name: String should match pattern"),
        ("- a list", "must be a mapping"),
        ("name: [", "is not YAML"),
        ("name: tiny\nmodel: {path: elsewhere}", "model.path: elsewhere is no checkpoint: there is no"),
        ("name: tiny\nmodel: {path: 'builtin:nothing'}", "model.path: builtin:nothing is no checkpoint"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_the_key(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cache_is_kept_as_it_is_computed_if_nothing_is_said(tmp_path):
    said = [load(tmp_path, GOOD + f"engine: {{{key}}}").engine for key in ("", "kv_cache_dtype: fp8")]
    assert [engine.kv_cache_dtype for engine in said] == [None, "fp8"]


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_service(tmp_path / "none.yaml")
