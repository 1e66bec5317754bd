"""The kinds of dictionary that can be trained, by the name that a configuration gives them."""

from trainer.penalised import Gated, JumpRelu, Relu, Tied
from trainer.step import Architecture
from trainer.top_k import TopK

ARCHITECTURES: dict[str, Architecture] = {
    "tied_relu": Tied(),
    "relu": Relu(),
    "top_k": TopK(),
    "batch_top_k": TopK(over_batch=True),
    "matryoshka": TopK(over_batch=True),
    "jump_relu": JumpRelu(),
    "gated": Gated(),
}
