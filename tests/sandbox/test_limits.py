import pytest

from dylora_moe.sandbox import Limits


@pytest.mark.parametrize("name", Limits.__slots__)
def test_every_limit_is_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        Limits(**{name: 0})
