"""`qat`: from a float PyTorch model to a verified integer one."""

from qat.algorithms.absorb import absorb_high_bias
from qat.algorithms.adaround import adaround
from qat.algorithms.batch_norm import reestimate_batch_norm
from qat.algorithms.bias import correct_bias
from qat.algorithms.calibrate import calibrate
from qat.algorithms.equalize import equalize
from qat.algorithms.gptq import gptq
from qat.algorithms.nuq import nuq
from qat.algorithms.reconstruct import reconstruct
from qat.analysis.compare import Comparison, compare
from qat.encoding import Encoding
from qat.encodings import Encodings
from qat.errors import QatError
from qat.export.io_mode import IoMode
from qat.export.model import export_onnx
from qat.export.tflite.model import export_tflite
from qat.graph.plan import Plan
from qat.graph.prepare import optimize_for_training, plan, prepare
from qat.graph.prepared import PreparedModel
from qat.integer.model import IntegerModel, convert
from qat.packages.build import Package, package
from qat.packages.verify import PackageVerification, verify_package
from qat.scheme import Granularity, ObserverSpec, QuantizerSpec, Scheme
from qat.schemes import LayerRule, Schemes
from qat.targets import Target, load_target
from qat.train.oscillation import OscillationTracker
from qat.train.oscillation_settings import OscillationSettings

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Encoding",
    "Encodings",
    "Granularity",
    "IntegerModel",
    "IoMode",
    "LayerRule",
    "ObserverSpec",
    "OscillationSettings",
    "OscillationTracker",
    "Package",
    "PackageVerification",
    "Plan",
    "PreparedModel",
    "QatError",
    "QuantizerSpec",
    "Scheme",
    "Schemes",
    "Target",
    "absorb_high_bias",
    "adaround",
    "calibrate",
    "compare",
    "convert",
    "correct_bias",
    "equalize",
    "export_onnx",
    "export_tflite",
    "gptq",
    "load_target",
    "nuq",
    "optimize_for_training",
    "package",
    "plan",
    "prepare",
    "reconstruct",
    "reestimate_batch_norm",
    "verify_package",
]
