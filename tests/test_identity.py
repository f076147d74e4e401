# ruff: noqa: NPY002
"""What makes another run, what makes no other run, and what is refused: by the code of a notebook's cells."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lablib import MLP, ResidualMLP, StreamlinedTrainer, TrainingConfig
from lablib.identity import describe, run_identity, run_name

tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
PRELUDE = """
import argparse, collections, dataclasses, enum, functools, threading, types
from dataclasses import dataclass, field
from functools import partial
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from lablib import MLP, StreamlinedTrainer
def ones(model):
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    return model
def parametrized(model, how):
    parametrize.register_parametrization(model, "weight", how)
    return ones(model)
def scaled(f, n):
    @functools.wraps(f)
    def g(x): return n * f(x)
    return g
"""


def cell(code: str, module: str = "__main__"):
    """What a notebook's cell defines as `it`."""
    names = {"__name__": module}
    exec(compile(PRELUDE + code, "<string>", "exec"), names)
    return names["it"]


def described(code: str, **more):
    return describe(cell(code, **more), "it")


ANOTHER = {  # what stands for … in the code makes another run
    "set": ("it = frozenset({1, (3, …)})", "1", "2"),
    "tensor": ("it = partial(StreamlinedTrainer, weights=torch.tensor([…]))", "1.0", "2.0"),
    "array": ("it = argparse.Namespace(weights=np.array([…]))", "1.0", "2.0"),
    "key that is no text": ("it = {None: collections.OrderedDict({…: 'a'})}", "1", "2"),
    "class attribute": ("class it(StreamlinedTrainer):\n loss = nn.CrossEntropyLoss(torch.tensor([…]))", "1.0", "2.0"),
    "method": ("class it(nn.Module):\n def forward(self, x): return x * …", "2", "3"),
    "decorated __init__": ("class it:\n @torch.no_grad()\n def __init__(self): self.x = …", "2", "3"),
    "property": ("class it:\n @property\n def size(self): return …", "1", "2"),
    "cached property": ("class it:\n @functools.cached_property\n def size(self): return …", "1", "2"),
    "bound method": ("class A:\n def f(self): return self.x\na = A()\na.x = …\nit = a.f", "1", "2"),
    "argument of a decorator": ("def f(x): return x\nit = torch.autocast('cpu', enabled=…)(f)", "True", "False"),
    "one's own decorator": ("it = scaled(torch.relu, …)", "1", "2"),
    "global variable of a nested function": ("W = …\ndef it(): return lambda x: x * W", "1", "2"),
    "global variable of a helper": ("W = …\ndef f(x): return x * W\ndef it(x): return f(x)", "1", "2"),
    "variables whose names have __": ("__W = 1\nW__ = …\ndef it(x): return x * __W * W__", "1", "2"),
    "import within a function": ("def it(x):\n from math import … as f\n return f(x)", "sin", "cos"),
    "module behind a name": ("import torch.… as F\ndef it(x): return F.softmax(x)", "nn.functional", "special"),
    "closure": ("def make(w): return lambda x: x * w\nit = make(…)", "1", "2"),
    "default argument": ("W = …\nit = lambda x, w=W: x * w\nW = 0", "1", "2"),
    "recursion": ("def f(n): return it(n - …)\ndef it(n): return f(n) if n else 0", "1", "2"),
    "one of the lambdas on a line": ("it = {'a': lambda x: x + 1, 'b': lambda x: x + 2}['…']", "a", "b"),
    "function in C": ("it = …", "torch.tanh", "torch.sinh"),
    "dataclass": ("@dataclass\nclass A:\n w: float\nit = A(…)", "1.0", "2.0"),
    "order of fields": ("@dataclass\nclass A:\n …\nit = lambda: A(1, 2)", "a: int; b: int", "b: int; a: int"),
    "default of a field": ("@dataclass\nclass it:\n w: list = field(default_factory=lambda: […])", "1", "2"),
    "state of a callback": ("class A:\n def __init__(self, w): self.w = w\nit = [A(…)]", "1", "2"),
    "what an __identity__ says": ("class A:\n def __identity__(self): return {'w': …}\nit = A()", "1", "2"),
    "buffer": ("it = nn.ReLU()\nit.register_buffer('w', torch.tensor([…]), persistent=False)", "1.0", "2.0"),
    "order of modules": (
        "it = nn.Sequential(collections.OrderedDict({n: nn.ReLU() if n == 'a' else nn.Tanh() for n in '…'}))",
        *("ab", "ba"),
    ),
    "module of a function": ("from torchvision.transforms.… import adjust_gamma as it", "functional", "v2.functional"),
    "method that is no function": ("class it:\n __call__ = functools.partialmethod(print, …)", "1", "2"),
    "order of steps": (
        "STEPS = {…}\ndef it(x): return [f(x) for f in STEPS.values()]",
        "'a': abs, 'b': len",
        "'b': len, 'a': abs",
    ),
    "hook of a weight": ("it = ones(MLP((4,)))\nif …: it.hidden[0].weight.register_hook(lambda g: g * 0)", "0", "1"),
    "module in a plain list": ("it = nn.ReLU()\nit.layers = [nn.Dropout(…)]", "0.1", "0.2"),
    "forward hook": ("it = nn.ReLU()\nit.register_forward_hook(lambda module, x, y: y * …)", "1", "2"),
    "forward of an object": ("it = nn.ReLU()\nit.forward = lambda x: x * …", "1", "2"),
    "frozen": ("it = ones(nn.Linear(1, 1)).requires_grad_(…)", "True", "False"),
    "parametrization": ("it = ones(parametrizations.weight_norm(nn.Linear(1, 1, bias=False), dim=…))", "0", "1"),
    "parametrized network": ("class A(nn.Linear):\n f = lambda s: …\nit = parametrized(A(1, 1), nn.ReLU())", "1", "2"),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_what_changes_a_result_makes_another_run(case):
    code, one, other = ANOTHER[case]
    first = described(code.replace("…", one))
    assert json.dumps(first) == json.dumps(described(code.replace("…", one), module="elsewhere"))
    assert first != described(code.replace("…", other))


LOG = "import logging\nlog = logging.getLogger('mine')\ndef it(x): log.info(x)"
THE_SAME = {
    "layout, comments, docstrings": ("def it(x):\n  'Doubled.'\n  return [(x*2)] # it", "def it( x ): return [\n x*2]"),
    "order of methods": ("class it:\n a = 1\n def b(self): return 2", "class it:\n def b(self): return 2\n a = 1"),
    "unused globals": ("W = x = 1\ndef it(x): return x.W", "W = x = 2\ndef it(x): return x.W"),
    "whole numbers": ("it = [4, 1.5, True]", "it = [4.0, np.float64(1.5), np.True_]"),
    "docstring of a class within": ("def it():\n class A: x = 1", 'def it():\n class A: "…"; x = 1'),
    "level of a logger": (LOG, LOG + "\nlog.setLevel('DEBUG')"),
    "order of a dict": ("it = {'a': 1, 'b': [3]}", "it = {'b': [3], 'a': 1}"),
    "shared and equal values": ("a = [torch.ones(1)]\nit = [a, a]", "it = [[torch.ones(1)], [torch.ones(1)]]"),
    "class of an earlier cell": ("class A:\n x = 1\nit = A()", "class A:\n x = 2\nclass A:\n x = 1\nit = A()"),
    "device and gradient": ("it = torch.ones(2)", "it = nn.Parameter(torch.ones(2, 2)[0])"),
}


@pytest.mark.parametrize("case", THE_SAME)
def test_what_changes_no_result_makes_no_other_run(case):
    one, other = THE_SAME[case]
    assert described(one) == described(other)


REFUSED = {
    "threading.Condition()": "it.held.*is a _thread.RLock",
    "np.random.default_rng(0)": "it.held is a numpy.*Generator",
    "torch.Generator()": "it.held is a torch",
    "type('Mine', (dict,), {})(a=1)": "it.held is a Mine",
    "collections.namedtuple('Mine', 'a')(1)": "it.held is a Mine",
    "np.array([1, 'a'], dtype=object)": "it.held is a numpy.ndarray",
    "np.ma.masked_array([1, 2], mask=[1, 0])": "it.held is a numpy.*MaskedArray",
    "functools.cache(lambda: 1)": "it.held is a functools._lru_cache_wrapper",
    "enum.Enum('Mine', 'A').A": "it.held is a Mine",
    "type('Mine', (), {'__slots__': ('a',)})()": "it.held.*a is a builtins.member_descriptor",
    "types.ModuleType('mine')": "it.held is a builtins.module.* import names from it; instead",
    "{'a': [1, {'b': threading.Lock()}]}": r"it.held\['a'\]\[1\]\['b'\] is a _thread.lock",
}


@pytest.mark.parametrize("held", REFUSED)
def test_what_cannot_be_told_is_refused_by_its_name(held):
    with pytest.raises(TypeError, match=REFUSED[held]):
        described(f"class A: pass\nit = A()\nit.held = {held}")


def test_many_functions_that_call_each_other_are_described_in_no_time():
    code = "\n".join(f"def f{n}(): return [{', '.join(f'f{m}()' for m in range(40))}]" for n in range(40))
    assert len(json.dumps(described(code + "\nit = f0"))) < 100_000


SAMPLE = '''
W = {"a": (1, 2.5), None: b"x", 1: {nn.Linear, nn.ReLU, nn.Tanh, "s", "t"}, 2: [nn.Tanh, nn.ReLU, nn.Linear]}
class Base:
    size = 3
@dataclasses.dataclass
class Settings(Base):
    rate: float = 0.5
    layers: list = dataclasses.field(default_factory=list)
    @property
    def total(self): return f"{self.rate!r:>{3}} = {self.size=}"
def it(x, *more, settings=Settings(), by=lambda x: (x, 2.0), **knobs):
    """Documented."""
    global W
    match len(more):
        case 0: raise ValueError(f"{x:.2f}" "joined" f"{settings.total}")
        case [1, *_]: return -1e-3j
    async def later(): return await it(x), [y @ by(W)[0] for y in more], {**knobs, "kind": Settings.size}, ...
    return type(it)(lambda: later if x in {"a", "b", "c"} else None)
'''


def test_a_description_is_the_same_in_each_process():
    code = "from test_identity import *; print(json.dumps(described(SAMPLE)))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}  # other orders of sets
    said = subprocess.check_output([sys.executable, "-c", code], env=environment)
    assert json.loads(said) == described(SAMPLE)


def test_a_file_that_is_changed_after_its_import_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("def double(x): return [y * 2 for y in x]\ndef half(x): return x / 2\n")
    mine = importlib.import_module("mine")
    before = describe(mine.double, "it")
    (tmp_path / "mine.py").write_text("# new\ndef double(x): return [y * 3 for y in x]\n")
    for function in (mine.double, mine.half):
        with pytest.raises(TypeError, match=rf"mine.py was changed after {function.__name__} was imported; restart"):
            describe(function, "it")
    (tmp_path / "mine.py").write_text("# new\ndef double(x):\n    return [y * 2 for y in x]\n")
    assert describe(mine.double, "it") == before


CONFIG = TrainingConfig(num_epochs=4, batch_size=8, validation_split=0.25, device="cpu")


@pytest.fixture
def name(tiny_data):
    """The name of a run of tiny_mlp, but for what is given."""

    def name(build_model=tiny_mlp, config=CONFIG, data=tiny_data, trainer_class=None, callbacks=()):
        return run_name(run_identity(build_model, config, data, trainer_class, callbacks))

    return name


SHARED = nn.Linear(36, 3)
TABLE = torch.ones(36, 3)


def constant(weights: torch.Tensor) -> nn.Module:
    (module := nn.Identity()).register_buffer("weights", weights)
    return module


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SHARED, ValueError, "Build the network in the function, or return copy.deepcopy"),
        (lambda: nn.Sequential(nn.Flatten(), SHARED), ValueError, "networks that share no weights"),
        (lambda: nn.Embedding.from_pretrained(TABLE, freeze=False), ValueError, "networks that share no weights"),
        (lambda: nn.Linear(1, 1).state_dict(), TypeError, "not a torch.nn.Module"),
        (lambda: torch.compile(tiny_mlp()), TypeError, r"write TrainingConfig\(torch_compile=True\)"),
        (lambda: constant(torch.from_numpy(np.random.rand(2))), ValueError, "not with NumPy or random"),
        (lambda: nn.Dropout(np.random.rand()), ValueError, "not with NumPy or random"),
    ],
)
def test_a_function_that_does_not_build_the_network_anew_is_refused(build, error, message, name):
    with pytest.raises(error, match=message):
        name(build)


def test_networks_may_share_constants_and_layers_without_weights_and_have_nan(name):
    activation, weights = nn.ReLU(), torch.ones(2)
    assert "Sequential-" in name(lambda: nn.Sequential(constant(weights), activation, nn.Threshold(0, float("nan"))))


CHANGED = {
    **{"num_epochs": 5, "batch_size": 9, "learning_rate": 0.01, "optimizer": "sgd", "weight_decay": 0.1, "seed": 1},
    **{"lr_schedule": "cosine", "warmup_fraction": 0.1, "max_grad_norm": 1.0, "validation_split": 0.3},
    **{"max_train_images": 10, "early_stopping_patience": 3, "early_stopping_metric": "loss", "rotation_degrees": 0.0},
    **{"translation_fraction": 0.0, "horizontal_flip": True, "crop_padding": 1, "precision": "bf16"},
    **{"deterministic": True, "torch_compile": True},
}
INDIFFERENT = {
    **{"output_dir": "elsewhere", "checkpoint_seconds": 1.0, "device": "auto", "use_wandb": True},
    **{"wandb_project": "other", "wandb_group": "other", "wandb_watch": True},
    **{"use_telegram_notifications": True, "telegram_additional_info": "other"},
    **{"telegram_bot_token": "1:other", "telegram_chat_id": "@other"},
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

    builders = [tiny_mlp, partial(changed, 0.0), partial(changed, 0.1)]
    builders += [partial(tiny_mlp, dropout=0.2), partial(ResidualMLP, **tiny_mlp.keywords)]
    assert len({name(build) for build in builders}) == 5
    same = [MLP, lambda: MLP((128, 64), 0.1, (1, 28, 28), 10), partial(MLP, image_shape=[1, 28, 28])]
    assert len({name(build, data=digits) for build in same}) == 1


def test_a_callback_makes_another_run_unless_it_only_watches(name):
    acting = cell("class it: pass")
    watching = cell("class it:\n def __identity__(self): return None")
    assert name(callbacks=[acting()]) != name()
    assert name(callbacks=[watching()]) == name()
    assert name(trainer_class=StreamlinedTrainer) == name()
