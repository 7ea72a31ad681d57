"""What is refused because of the device that is there."""

import pytest
import torch

from skv_dist.config.run import RunConfig
from skv_dist.errors import UserError
from skv_dist.model import megatron_config
from skv_dist.model.megatron_config import check_device, transformer_impl
from tests.support.settings import config


def test_dropout_that_a_gpu_kernel_would_leave_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    both = config(model={"attention_dropout": 0.1}, data={"reset_attention": True})
    run = RunConfig.model_validate(both)
    check_device(run)  # on a CPU it is applied
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"data.reset_attention: true and model.attention_dropout 0.1 .* set model"):
        check_device(run)
    check_device(RunConfig.model_validate(config(model={"attention_dropout": 0.1})))
    windows = config(model={"attention_dropout": 0.1, "sliding_window": 4, "sliding_layers": [1]})
    with pytest.raises(UserError, match=r"model.sliding_window 4 and model.attention_dropout 0.1"):
        check_device(RunConfig.model_validate(windows))


@pytest.mark.parametrize("installed", [False, True])
def test_parameters_have_the_same_names_whether_transformer_engine_is_installed_or_not(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(megatron_config, "has_transformer_engine", lambda: installed)
    by_default = RunConfig.model_validate(config(model={"transformer_impl": "auto"}))
    assert transformer_impl(by_default) == "local"
    by_name = RunConfig.model_validate(config(model={"transformer_impl": "transformer_engine"}))
    if installed:
        assert transformer_impl(by_name) == "transformer_engine"
    else:
        with pytest.raises(UserError, match=r"cannot be imported here: .* set model.transformer_impl=local"):
            transformer_impl(by_name)
