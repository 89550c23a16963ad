"""A plan in PyTorch 2 export quantization (PT2E, from torchao): a quantizer for `prepare_pt2e` and `convert_pt2e`.

    quantized = pt2e.apply(model, plan, batches)  # all of what follows
    exported = torch.export.export(model, example_inputs).module()
    prepared = prepare_pt2e(exported, pt2e.PlanQuantizer(plan, model))
    prepared(*batch)                              # with 8-bit activations: calibrate
    quantized = convert_pt2e(prepared)            # runs as it is, or under torch.compile
    pt2e.verify(quantized, plan, model)

A plan with float activations keeps them: only weights are quantized, and the result is to the bit what `apply` makes
of the folded model. Where PT2E folds a norm that torch.fx does not show (a functional one, or in a model that it cannot
trace), codes per channel stay and scales follow, as long as the graph still computes what the model does.

With 8-bit activations, X86InductorQuantizer's rules quantize the inputs of planned linear and two-dimensional
convolution layers, whose weights must be symmetric. The converted state dict still holds the float weights beside the
int8 ones.
"""

from .checks import CAPABILITIES, check
from .conversion import apply
from .quantizer import PlanQuantizer
from .verification import verify

__all__ = [
    "CAPABILITIES",
    "PlanQuantizer",
    "apply",
    "check",
    "verify",
]
