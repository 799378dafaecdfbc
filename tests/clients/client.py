"""One case of tests/clients.py in a Python client: `python client.py NAME CASE.json` prints a Result as JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

Feeds = dict[str, np.ndarray]
Call = Callable[[Feeds], dict[str, np.ndarray]]
Load = Callable[[], Call]


def onnxruntime(file: str, feeds: Feeds) -> tuple[str, Load]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)

    def load() -> Call:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))

    return onnxruntime.__version__, load


def openvino(file: str, feeds: Feeds) -> tuple[str, Load]:
    import openvino

    def load() -> Call:
        # Without the hint it computes in bfloat16 where the processor can.
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda feeds: {name: np.array(value) for port, value in compiled(feeds).items() for name in port.names}

    return openvino.__version__.partition("-")[0], load


def reference(file: str, feeds: Feeds) -> tuple[str, Load]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    def load() -> Call:
        evaluator = ReferenceEvaluator(file)
        return lambda feeds: dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))

    return onnx.__version__, load


def tract(file: str, feeds: Feeds) -> tuple[str, Load]:
    from importlib.metadata import version

    import tract

    def load() -> Call:
        model = tract.onnx().load(file)
        inputs = [model.input_name(k) for k in range(model.input_count())]
        outputs = [model.output_name(k) for k in range(model.output_count())]
        for k, name in enumerate(inputs):  # it wants shapes of numbers, and names types f32 and i64
            kind = feeds[name].dtype
            model.set_input_fact(k, ",".join((*map(str, feeds[name].shape), f"{kind.kind}{8 * kind.itemsize}")))
        runnable = model.into_model().into_runnable()

        def call(feeds: Feeds) -> dict[str, np.ndarray]:
            results = runnable.run([feeds[name] for name in inputs])
            return dict(zip(outputs, (value.to_numpy() for value in results), strict=True))

        return call

    return version("tract"), load


def run(name: str, case: dict) -> dict:
    """version; loaded; reason: why it failed, or None; values: of the output, flat."""
    feeds = {
        name: np.array(feed["values"], feed["dtype"]).reshape(feed["shape"]) for name, feed in case["feeds"].items()
    }
    version, load = globals()[name](case["file"], feeds)
    result = {"version": version, "loaded": False, "reason": None, "values": []}
    try:
        call = load()
        result["loaded"] = True
        for _ in range(case["loops"]):
            outputs = call(feeds)
            feeds |= {name: outputs[output] for name, output in case["carry"].items()}
        result["values"] = outputs[case["output"]].astype(float).ravel().tolist()
    except Exception as error:  # each client has its own
        result["reason"] = f"{error}" or type(error).__name__
    return result


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
