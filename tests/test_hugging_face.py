"""Models of Hugging Face, one mixed batch against one backward a task."""

import pytest
import streamed
import torch
from streamed import check_gradients, check_grams, check_steps, draw_tasks, one_backward_a_task, one_batch, two
from torch.nn import functional as F

GRANULARITIES = ["all_layer", "all_matrix", "whole_model"]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads):
    """These models are too small to share; conftest's fixture restores the number."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(("granularity", "steps"), [("all_layer", 20), ("whole_model", 5)])
def test_t5(granularity, steps):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )

    def inputs_of(num_samples, generator):
        ids = torch.randint(2, 50, (num_samples, 8), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, 5:] = torch.randint(2, (num_samples, 1), generator=generator)
        return [ids, mask, torch.randint(2, 50, (num_samples, 6), generator=generator)]

    def losses_of(model, inputs):
        ids, mask, labels = inputs
        logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
        return streamed.next_token_losses(logits, labels)

    check_steps(model, losses_of, inputs_of, steps, granularity=granularity)


@pytest.mark.parametrize(("granularity", "steps"), [("all_layer", 20), ("whole_model", 5)])
def test_vit(granularity, steps):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, num_labels=5, hidden_dropout_prob=0.0, **sizes)
    )

    def inputs_of(num_samples, generator):
        images = torch.randn(num_samples, 3, 16, 16, generator=generator)
        return [images, torch.randint(5, (num_samples,), generator=generator)]

    def losses_of(model, inputs):
        return F.cross_entropy(model(pixel_values=inputs[0]).logits, inputs[1], reduction="none")

    check_steps(model, losses_of, inputs_of, steps, granularity=granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gpt2_and_its_conv1d(granularity):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    def losses_of(model, inputs):
        logits = model(input_ids=inputs[0]).logits
        return streamed.next_token_losses(logits[:, :-1], inputs[0][:, 1:])

    def inputs_of(n, generator):
        return [torch.randint(40, (n, 9), generator=generator)]

    check_steps(model, losses_of, inputs_of, 4, granularity=granularity)


SIZES = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 20, "state_size": 4},
    **{"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "layer_norm_eps": 1e-5},
    **{"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "encoder_layerdrop": 0.0},
    **{"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "decoder_layerdrop": 0.0},
    **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
    **{"dropout": 0.0, "dropout_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    **{"attention_dropout": 0.0, "hidden_dropout": 0.0, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Each model takes those of them that it knows."""


def made(name, **more):
    """``XForY`` with the configuration ``XConfig``."""
    import transformers

    torch.manual_seed(0)
    config = {"Gemma3": "Gemma3Text", "MarianMT": "Marian"}.get(name.split("For")[0].removesuffix("Model"))
    config = getattr(transformers, (config or name.split("For")[0]) + "Config")
    return getattr(transformers, name)(config(**SIZES | more)).train()


def ids_of(num_samples, generator):
    ids = torch.randint(3, 40, (num_samples, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 6:] = torch.randint(2, (num_samples, 1), generator=generator)
    return [ids, mask]


def token_losses(model, inputs):
    ids, mask = inputs
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, attention_mask=mask, **both).logits
    return streamed.next_token_losses(logits[:, :-1], ids[:, 1:])


@pytest.mark.parametrize(
    "name",
    [
        *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"),
        *("Phi3ForCausalLM", "Olmo2ForCausalLM", "GPTNeoXForCausalLM", "BloomForCausalLM", "MambaForCausalLM"),
        *("BertForMaskedLM", "XLMRobertaForMaskedLM", "AlbertForMaskedLM", "DebertaV2ForMaskedLM"),
        *("ModernBertForMaskedLM", "MBartForConditionalGeneration", "M2M100ForConditionalGeneration", "MarianMTModel"),
        *("MT5ForConditionalGeneration", "LongT5ForConditionalGeneration"),
    ],
)
def test_models_of_text(name):
    """One step in float64, as near as models come that normalise in float32 whatever they are given."""
    model = made(name).double()
    (buffered, by_task), (batched, by_batch) = two(model, 3)
    inputs, task_of_sample = ids_of(9, torch.Generator().manual_seed(0)), draw_tasks(3, 9, 0)
    want = one_backward_a_task(buffered, by_task, token_losses, inputs, task_of_sample)
    found = one_batch(batched, by_batch, token_losses, inputs, task_of_sample)
    check_gradients(batched, buffered, by_task.groups, 1e-6)
    check_grams(found.gram, want.gram, 1e-6)
    assert torch.equal(found.corrected, want.corrected)


def grouped_in_float32(model, inputs):
    """Grouped products are the default, but torch has none in float64."""
    model.set_experts_implementation("eager" if model.dtype == torch.float64 else "grouped_mm")
    return token_losses(model, inputs)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_experts_with_grouped_products(name):
    check_steps(made(name), grouped_in_float32, ids_of, 4)


def test_experts_with_room_for_all():
    """With less, whether a token finds room would depend on those of the other tasks."""
    more = {"num_experts": 4, "expert_capacity": 999, "router_jitter_noise": 0.0, "moe_token_dropout": 0.0}
    model = made("NllbMoeForConditionalGeneration", **more, encoder_sparse_step=2, decoder_sparse_step=2)

    def losses_of(model, inputs):
        for module in model.modules():
            if type(module).__name__ == "NllbMoeTop2Router":
                module.dtype = model.dtype  # or it would change its parameters' type
        return token_losses(model, inputs)

    check_steps(model, losses_of, ids_of, 4)
