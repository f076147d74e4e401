# ruff: noqa: NPY002
"""What makes another run, what makes no other run, and what is refused: by the code of a notebook's cells."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lablib import MLP, ResidualMLP, StreamlinedTrainer, TrainingConfig
from lablib.identity import describe, run_identity, run_name

tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
PRELUDE = """
import enum, functools, threading, types
from dataclasses import dataclass, field
from functools import partial
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from lablib import MLP, StreamlinedTrainer
torch.manual_seed(0)
def scaled(f, n):
    @functools.wraps(f)
    def g(x): return n * f(x)
    return g
"""


def described(code: str, module: str = "__main__"):
    """The description of what a notebook's cell defines as `it`."""
    names = {"__name__": module}
    exec(PRELUDE + code, names)
    return describe(names["it"], "it")


ANOTHER = {  # what stands for … in the code makes another run
    "tensor": ("it = partial(StreamlinedTrainer, weights=torch.tensor([…]))", "1.0", "2.0"),
    "array": ("it = np.array([torch.float32, …])", "1", "2"),
    "member of an enum": ("A = enum.Enum('A', 'x y')\nit = lambda: A.x.value\nit.of = A.…", "x", "y"),
    "class attribute": ("class it(StreamlinedTrainer):\n loss = nn.CrossEntropyLoss(torch.tensor([…]))", "1.0", "2.0"),
    "method": ("class it(nn.Module):\n def forward(self, x): return x * …", "2", "3"),
    "decorated __init__": ("class it:\n @torch.no_grad()\n def __init__(self): self.x = …", "2", "3"),
    "property": ("class it:\n @property\n def size(self): return …", "1", "2"),
    "bound method": ("class A:\n def f(self): return self.x\nit = A().f\nit.__self__.x = …", "1", "2"),
    "one's own decorator": ("it = scaled(torch.relu, …)", "1", "2"),
    "cached function": ("it = functools.cache(lambda: …)", "1", "2"),
    "global variable of a helper": ("W = …\ndef f(): return lambda x: x * W\ndef it(x): return f()(x)", "1", "2"),
    "default of a field": ("@dataclass\nclass it:\n w: list = field(default_factory=lambda: […])", "1", "2"),
    "state of a callback": ("class A:\n def __init__(self, w): self.w = w\nit = [A(…)]", "1", "2"),
    "order of named steps": ("it = dict(…)", "a=abs, b=len", "b=len, a=abs"),
    "hook of a weight": ("it = MLP((4,))\nif …: it.hidden[0].weight.register_hook(lambda g: g * 0)", "0", "1"),
    "forward hook": ("it = nn.ReLU()\nit.register_forward_hook(lambda module, x, y: y * …)", "1", "2"),
    "frozen": ("it = nn.Linear(1, 1).requires_grad_(…)", "True", "False"),
    "parametrization": ("it = parametrizations.weight_norm(nn.Linear(1, 1, bias=False), dim=…)", "0", "1"),
    "LSTM": ("class A(nn.LSTM): f = lambda s: …\nit = A(1, 1)", "1", "2"),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_what_changes_a_result_makes_another_run(case):
    code, one, other = ANOTHER[case]
    first = described(code.replace("…", one))
    assert json.dumps(first) == json.dumps(described(code.replace("…", one), module="elsewhere"))
    assert first != described(code.replace("…", other))


THE_SAME = {
    "layout, comments, docstrings": ("def it(x):\n  'Doubled.'\n  return [(x*2)] # it", "def it( x ): return [\n x*2]"),
    "order of methods": ("class it:\n a = 1\n def b(self): return 2", "class it:\n def b(self): return 2\n a = 1"),
    "unused globals": ("W = x = 1\ndef it(x): return x.W", "W = x = 2\ndef it(x): return x.W"),
    "order of a dict": ("it = {'a': 1, 'b': [3]}", "it = {'b': [3], 'a': 1}"),
}


@pytest.mark.parametrize("case", THE_SAME)
def test_what_changes_no_result_makes_no_other_run(case):
    one, other = THE_SAME[case]
    assert described(one) == described(other)


REFUSED = {
    "threading.Condition()": r"\['held'\]\['state'\]\['_lock'\] is a RLock",
    "types.ModuleType('mine')": r"\['held'\] is a module",
    "{'a': [1, {'b': threading.Lock()}]}": r"\['held'\]\['a'\]\[1\]\['b'\] is a lock, which cannot be described",
}


@pytest.mark.parametrize("held", REFUSED)
def test_what_cannot_be_told_is_refused_by_its_name(held):
    with pytest.raises(TypeError, match=REFUSED[held]):
        described(f"class A: pass\nit = A()\nit.held = {held}")


ELSEWHERE = """
import joblib
from lablib.identity import describe
W = {"a": (1, 2.5), None: b"x", 1: {nn.Linear, nn.ReLU, nn.Tanh, "s", "t"}, 2: [nn.Tanh, nn.ReLU, nn.Linear]}
Kind = enum.Enum("Kind", "A B")
@dataclass
class Settings:
    kind: Kind = Kind.A
    layers: list = field(default_factory=list)
class Mine(StreamlinedTrainer):
    settings = Settings(layers=[Kind.A])
    def compute_loss(self, *args, **more):
        return super().compute_loss(*args, **more) * W[None] if self in {"a", "b", "c"} else [it for _ in W]
it = partial(Mine, weights=np.arange(3), by=lambda x: scaled(torch.relu, x))
print(describe(it, "it") == joblib.Parallel(2)([joblib.delayed(describe)(it, "it")])[0])
"""


def test_a_description_is_the_same_in_a_worker_of_joblib():
    environment = os.environ | {"PYTHONHASHSEED": "random", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", PRELUDE + ELSEWHERE], env=environment) == b"True\n"


CONFIG = TrainingConfig(num_epochs=4, batch_size=8, validation_split=0.25, device="cpu")


@pytest.fixture
def name(tiny_data):
    """The name of a run of tiny_mlp, but for what is given."""

    def name(build_model=tiny_mlp, config=CONFIG, data=tiny_data, trainer_class=None, callbacks=()):
        return run_name(run_identity(build_model, config, data, trainer_class, callbacks))

    return name


SHARED = nn.Linear(36, 3), nn.BatchNorm1d(36, affine=False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SHARED[0], "build it there"),
        (lambda: nn.Sequential(nn.Flatten(), SHARED[1], nn.Linear(36, 3)), "networks that share no tensor"),
        (lambda: torch.compile(tiny_mlp()), "compile with TrainingConfig.torch_compile"),
        (lambda: nn.Dropout(np.random.rand()), "not NumPy or random"),
    ],
)
def test_a_function_that_does_not_build_the_network_anew_is_refused(build, message, name):
    with pytest.raises(ValueError, match=message):
        name(build)


CHANGED = {
    **{"num_epochs": 5, "batch_size": 9, "learning_rate": 0.01, "optimizer": "sgd", "weight_decay": 0.1, "seed": 1},
    **{"lr_schedule": "cosine", "warmup_fraction": 0.1, "max_grad_norm": 1.0, "validation_split": 0.3},
    **{"max_train_images": 10, "early_stopping_patience": 3, "early_stopping_metric": "loss", "rotation_degrees": 0.0},
    **{"translation_fraction": 0.0, "horizontal_flip": True, "crop_padding": 1, "precision": "bf16"},
    **{"deterministic": True, "torch_compile": True},
}
INDIFFERENT = {
    **{"output_dir": "elsewhere", "checkpoint_seconds": 1.0, "device": "auto", "use_wandb": True, "wandb_watch": True},
    **{"wandb_project": "other", "wandb_group": "other", "use_telegram_notifications": True},
    **{"telegram_additional_info": "other", "telegram_bot_token": "1:other", "telegram_chat_id": "@other"},
}


def test_each_knob_either_makes_another_run_or_does_not(name):
    assert CHANGED.keys() | INDIFFERENT.keys() == {field.name for field in dataclasses.fields(TrainingConfig)}
    others = {knob: name(config=replace(CONFIG, **{knob: value})) for knob, value in (CHANGED | INDIFFERENT).items()}
    assert {knob for knob, other in others.items() if other == name()} == INDIFFERENT.keys()
    assert name(config=replace(CONFIG, precision="fp32")) == name()  # which is what "auto" comes to


def test_a_network_of_lablib_is_known_by_its_arguments_however_it_is_built_and_by_its_weights_if_changed(name, digits):
    def changed(bias):
        nn.init.constant_((model := tiny_mlp()).classifier.bias, bias)
        return model

    others = [partial(changed, 0.0), partial(changed, 0.1), partial(tiny_mlp, dropout=0.2), ResidualMLP]
    assert len({name(build) for build in (tiny_mlp, *others)}) == 5
    same = [MLP, lambda: MLP((128, 64), 0.1, (1, 28, 28), 10), partial(MLP, image_shape=[1, 28, 28])]
    assert len({name(build, data=digits) for build in same}) == 1


def test_a_callback_makes_another_run_unless_it_only_watches(name):
    watching = type("Watching", (), {"__identity__": lambda self: None})
    assert name(callbacks=[SimpleNamespace()]) != name(callbacks=[watching()]) == name()
    assert name(trainer_class=StreamlinedTrainer) == name()
