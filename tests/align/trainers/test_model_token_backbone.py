"""What the output layer is given, of every kind of model, beside the model's own logits for each prefix alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_loss import LogitTransform

PREFIXES = [[5, 9, 3, 88, 21], [44], [7, 7, 7, 7, 7, 7, 7, 7, 7], [1, 0, 2]]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


EAGER_ONLY = ("bloom", "gemma2")
WAYS = [(kind, "sdpa") for kind in ("llama", "qwen2", "qwen3", "gpt2", "mistral", "cohere")]
WAYS += [(kind, "eager") for kind in ("llama", "qwen2", "gpt2", "mistral", *EAGER_ONLY)] + [("mamba", None)]


@pytest.mark.parametrize(("kind", "attention"), WAYS)
def test_equals_every_prefix_alone(build, kind, attention):
    model = build(kind, attention)
    backbone = Backbone(model)
    found = backbone(PREFIXES)
    logits = torch.cat([model(input_ids=torch.tensor([prefix])).logits[:, -1] for prefix in PREFIXES]).detach()
    torch.testing.assert_close(found.word_lse, logits.logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.word_max, logits.amax(1), rtol=1e-5, atol=1e-5)
    head = model.get_output_embeddings()
    torch.testing.assert_close(backbone.transform(head(found.hidden)).detach(), logits, rtol=1e-5, atol=1e-5)


def test_hidden_states_are_after_the_final_norm(build):
    model = build("llama")
    outside = model.model(input_ids=torch.tensor([PREFIXES[0]])).last_hidden_state[:, -1]
    torch.testing.assert_close(Backbone(model)([PREFIXES[0]]).hidden, outside.detach())


def granite():
    config = AutoConfig.for_model("granite", **SMALL, vocab_size=96, num_key_value_heads=2, logits_scaling=8.0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("model", "transform"),
    [
        (lambda build: build("llama"), LogitTransform(1.0, None)),
        (lambda build: build("gemma2", "eager"), LogitTransform(1.0, 5.0)),
        (lambda build: build("gemma2", "eager", final_logit_softcapping=None), LogitTransform(1.0, None)),
        (lambda build: build("cohere"), LogitTransform(0.25, None)),
        (lambda build: granite(), LogitTransform(0.125, None)),
        (lambda build: build("cohere", dtype=torch.bfloat16), LogitTransform(0.25, None)),
        (lambda build: build("gemma2", "eager", dtype=torch.bfloat16), LogitTransform(1.0, 5.0)),
    ],
)
def test_transform_is_found(build, model, transform):
    assert Backbone(model(build)).transform == transform


def test_unknown_transform_is_refused(build):
    model = build("llama")
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits + 1) or output)
    with pytest.raises(ModelTokenError, match="LlamaForCausalLM changes its logits .* not known"):
        Backbone(model)


def test_model_that_sees_what_follows_is_refused(build):
    model = build("llama")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": _everything(kwargs["input_ids"])}),
        with_kwargs=True,
    )
    with pytest.raises(ModelTokenError, match="padded on the right"):
        Backbone(model)


def _everything(ids):
    return torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])


def test_damaged_weights_are_refused(build):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelTokenError, match="NaN"):
        Backbone(model)


def test_adapter_on_the_output_layer_is_refused(build):
    model = get_peft_model(build("llama", tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ModelTokenError, match="merge an adapter"):
        Backbone(model)


def test_lora_elsewhere_and_bias(build):
    inner = build("llama", tie_word_embeddings=False)
    inner.lm_head.bias = nn.Parameter(torch.randn(96))
    adapted = get_peft_model(inner, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    found = Backbone(adapted)(PREFIXES)
    logits = torch.cat([adapted(input_ids=torch.tensor([prefix])).logits[:, -1] for prefix in PREFIXES])
    torch.testing.assert_close(found.word_lse, logits.logsumexp(1).detach())


def test_model_is_left_as_it_was(build):
    model = build("llama", attention_dropout=0.5).train()
    before = model(input_ids=torch.tensor([[3]])).logits
    backbone = Backbone(model)
    first, second = backbone(PREFIXES), backbone(PREFIXES)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert model.training and "forward" not in model.lm_head.__dict__
    torch.testing.assert_close(model(input_ids=torch.tensor([[3]])).logits.shape, before.shape)


def test_digest(build):
    digest = Backbone(build("llama")).digest()
    assert digest == Backbone(build("llama", "eager")).digest(), "another way of computing the same"
    assert digest != Backbone(build("llama", dtype=torch.bfloat16)).digest()
    assert digest != Backbone(build("llama", rope_parameters={"rope_type": "default", "rope_theta": 5.0})).digest()
    other = build("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    assert digest != Backbone(other).digest()
