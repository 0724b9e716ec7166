"""LoRA really trained with PEFT on a pruned model, taken over and merged the sparse way."""

import copy
import math

import pytest
import torch
from adapter_parts import outputs, pruned
from torch import nn

from perpkit.retraining.adapters.attach import adapter_parameters
from perpkit.retraining.adapters.merge import merge
from perpkit.retraining.adapters.peft_import import import_peft

peft = pytest.importorskip("peft")
# PEFT 0.21 asks transformers 5 by a name that it is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trained(model, inputs, **settings):
    """A PeftModel around a copy of the model, its LoRA trained for some steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
        for _ in range(4):
            optimizer.zero_grad()
            (outputs(wrapped, inputs).float() ** 2).mean().backward()
            optimizer.step()
    return wrapped.eval()


def check_import(plain, masks, wrapped, inputs, folder):
    """`lora` gives PEFT's function; the sparse kinds merge to PEFT's update, masked."""
    wrapped.save_pretrained(folder)
    wanted = outputs(wrapped, inputs)
    assert (wanted - outputs(plain, inputs)).norm() > 1e-3 * wanted.norm()
    dense = copy.deepcopy(wrapped).merge_and_unload()
    for source in (wrapped, folder, str(folder)):
        model = copy.deepcopy(plain)
        import_peft(model, masks, source, kind="lora")
        torch.testing.assert_close(outputs(model, inputs), wanted, rtol=1e-4, atol=1e-5)
        for kind in ("mask_lora", "lora_prune"):
            model = copy.deepcopy(plain)
            added = import_peft(model, masks, source, kind=kind)
            assert added == adapter_parameters(model)
            merge(model)
            masks.check(model)
            for name, mask in masks.items():
                update = dense.get_parameter(name) - plain.get_parameter(name)
                torch.testing.assert_close(
                    model.get_parameter(name), plain.get_parameter(name) + mask * update, rtol=1e-4, atol=1e-5
                )
    assert not adapter_parameters(plain)


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("opt", ["q_proj", "fc2"]), ("llama", "all-linear"), ("gpt2", ["c_attn", "c_proj"])],
)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_language_models(make_model, windows, tmp_path, architecture, targets, rslora):
    plain, masks = pruned(make_model(architecture))
    wrapped = trained(plain, windows, target_modules=targets, use_rslora=rslora)
    check_import(plain, masks, wrapped, windows, tmp_path)


def test_ranks_and_alphas_of_their_own(make_model, windows, tmp_path):
    plain, masks = pruned(make_model("opt"))
    patterns = {"rank_pattern": {"fc1": 2, "layers.1.fc2": 3}, "alpha_pattern": {"fc1": 5}}
    wrapped = trained(plain, windows, target_modules=["fc1", "fc2"], **patterns)
    check_import(plain, masks, wrapped, windows, tmp_path)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_fused_experts(make_model, windows, tmp_path, architecture):
    plain, masks = pruned(make_model(architecture))
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    wrapped = trained(plain, windows, target_modules=["o_proj"], target_parameters=targets)
    check_import(plain, masks, wrapped, windows, tmp_path)


def test_convolutions(make_vision, images, tmp_path):
    plain, masks = pruned(make_vision("sequential"))
    wrapped = trained(plain, images, target_modules=["0", "7"])
    check_import(plain, masks, wrapped, images, tmp_path)


def test_an_adapter_by_name(make_model, windows):
    plain, masks = pruned(make_model("opt"))
    wrapped = trained(plain, windows, target_modules=["fc1"])
    wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["fc2"]))
    added = import_peft(copy.deepcopy(plain), masks, wrapped, adapter="other")
    assert all(".fc2." in name for name in added)
    with pytest.raises(ValueError, match="no adapter 'third'; the adapters are default, other"):
        import_peft(plain, masks, wrapped, adapter="third")


def test_the_scale_is_kept(make_model, windows):
    plain, masks = pruned(make_model("opt"))
    for rslora, scale in ((False, 6 / 4), (True, 6 / math.sqrt(4))):
        wrapped = trained(plain, windows, target_modules=["fc1"], use_rslora=rslora)
        model = copy.deepcopy(plain)
        import_peft(model, masks, wrapped)
        assert model.model.decoder.layers[0].fc1.adapters["weight"].scale == pytest.approx(scale)


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "trained with use_dora"),
        ({"lora_bias": True}, "trained with lora_bias"),
        ({"bias": "all"}, "bias'?, which is no LoRA factor"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the weights beneath"),
        ({"modules_to_save": ["fc2"]}, "which is no LoRA factor"),
        ({"target_modules": ["embed_tokens"]}, "which is no LoRA factor"),
        ({"target_modules": ["lm_head"]}, "not on embeddings or the head"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_lora_is_refused(make_model, windows, settings, message):
    plain, masks = pruned(make_model("opt", tie_word_embeddings=False))
    wrapped = trained(plain, windows, **{"target_modules": ["fc1"], **settings})
    with pytest.raises(ValueError, match=message):
        import_peft(plain, masks, wrapped)
    assert not adapter_parameters(plain)


def test_another_method_is_refused(make_model):
    plain, masks = pruned(make_model("opt"))
    wrapped = peft.get_peft_model(
        copy.deepcopy(plain), peft.IA3Config(target_modules=["fc1"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="the adapter is IA3; only LORA can be taken over"):
        import_peft(plain, masks, wrapped)


def test_a_model_that_holds_pefts_layers_is_refused_and_works_once_they_are_off(
    make_model, windows, tmp_path
):
    plain, masks = pruned(make_model("opt"))
    wrapped = trained(plain, windows, target_modules=["fc1"])
    wrapped.save_pretrained(tmp_path)
    inner = wrapped.base_model.model
    with pytest.raises(ValueError, match=r"still holds PEFT's layers.*peft_model\.unload\(\)"):
        import_peft(inner, masks, wrapped)
    import_peft(wrapped.unload(), masks, tmp_path)
    assert len(adapter_parameters(inner)) == 4


def test_an_adapter_of_another_model_is_refused(make_model, windows):
    plain, masks = pruned(make_model("opt"))
    for other in (
        make_model("opt", ffn_dim=64),
        make_model("opt", num_hidden_layers=3),
        make_model("llama"),
    ):
        model, _ = pruned(other)
        wrapped = trained(model, windows, target_modules="all-linear")
        with pytest.raises(
            ValueError, match=r"belong to another model|fits no prunable matrix of this model"
        ):
            import_peft(plain, masks, wrapped)
        assert not adapter_parameters(plain)


def test_bad_sources_and_kinds(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        import_peft(model, None, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read the adapter in"):
        import_peft(model, None, tmp_path)
    with pytest.raises(ValueError, match="the source is a Sequential"):
        import_peft(model, None, model)
    with pytest.raises(ValueError, match="unknown kind of adapter 'dora'"):
        import_peft(model, None, tmp_path, kind="dora")
    with pytest.raises(ValueError, match="cannot become scale_lora"):
        import_peft(model, None, tmp_path, kind="scale_lora")
