"""Small real PEFT models for tests."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rows import WORDS

D_OUT, D_IN = 10, 12


class Net(nn.Module):
    """Two linear layers of one shape, one of another, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D_IN, D_IN)
        self.second = nn.Linear(D_IN, D_IN)
        self.down = nn.Linear(D_IN, D_OUT)
        self.head = nn.Linear(D_OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.second(torch.tanh(self.first(x)))))))


def lora_net(
    r: int = 4,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **config: Any,
) -> PeftModel:
    """`Net` with stock LoRA on its three inner layers and the head in modules_to_save."""
    settings = {
        "target_modules": ["first", "second", "down"],
        "modules_to_save": ["head"],
        "lora_alpha": r * scale,
        **config,
    }
    return get_peft_model(
        Net().to(dtype), LoraConfig(r=r, **settings), autocast_adapter_dtype=False
    )


def batch(dtype: torch.dtype = torch.float64, rows: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, D_IN, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 3, (rows,), generator=generator)


def backward(model: nn.Module, dtype: torch.dtype = torch.float64) -> float:
    """Fresh gradients of the cross-entropy on one fixed batch."""
    x, labels = batch(dtype)
    model.zero_grad()
    loss = nn.functional.cross_entropy(
        model(x).float() if dtype != torch.float64 else model(x), labels
    )
    loss.backward()
    return float(loss.detach())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, **kwargs: Any
) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(backward(model, **kwargs))
        optimizer.step()
    return losses


class OneLayer:
    """A single PEFT linear layer with loss ½||X (W0 + W) - T||² / n, whose G is known in closed form."""

    def __init__(
        self,
        r: int,
        scale: float,
        d_out: int = 14,
        d_in: int = 11,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        base = nn.Sequential(nn.Linear(d_in, d_out, bias=False)).to(dtype)
        self.x = torch.randn(40, d_in, generator=generator, dtype=torch.float64).to(dtype)
        true = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).to(dtype)
        self.target = self.x @ true.mT
        config = LoraConfig(r=r, lora_alpha=r * scale, target_modules=["0"])
        self.model = get_peft_model(base, config, autocast_adapter_dtype=False)
        self.layer = self.model.base_model.model[0]
        self.A = self.layer.lora_A["default"].weight
        self.B = self.layer.lora_B["default"].weight
        self.scale = scale
        self.name = "0"

    @property
    def W(self) -> Tensor:
        return (self.scale * self.B.double() @ self.A.double()).detach()

    def gradient(self, W: Tensor) -> Tensor:
        W0 = self.layer.base_layer.weight.detach().double()
        x, target = self.x.double(), self.target.double()
        return (x @ (W0 + W).mT - target).mT @ x / len(x)

    def backward(self) -> None:
        self.model.zero_grad()
        loss = 0.5 * (self.model(self.x) - self.target).square().sum() / len(self.x)
        loss.backward()


def pairs_of(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter, float]]:
    from geolora.pairs.find import find_pairs

    return [(pair.name, pair.A, pair.B, pair.scale) for pair in find_pairs(model)]


def products(model: nn.Module) -> dict[str, Tensor]:
    """{layer: W}."""
    return {name: (scale * B @ A).detach() for name, A, B, scale in pairs_of(model)}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


Build = Callable[..., Any]


def tiny_bert(folder: Any) -> Any:
    """A BERT of width 32 with its tokenizer, saved as a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_llama(folder: Any, chat: bool = False) -> Any:
    """A Llama of width 32 with a tokenizer of words, digits and `####`, saved as a model folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    marks = ["<unk>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "####", *"0123456789+="]
    vocabulary = {word: i for i, word in enumerate([*marks, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", model_max_length=64,
        chat_template=CHAT if chat else None,
    ).save_pretrained(folder)  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_vit(folder: Any) -> Any:
    """A vision transformer of width 32 for pictures of 16 x 16, with its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=16, patch_size=4,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
