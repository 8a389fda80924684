from debiased_laplace.calibration.rendering.formatting import format_signed


def test_numbers_with_an_exponent_keep_their_sign() -> None:
    assert format_signed(1.87e-6) == "+1.87e\u221206"
    assert format_signed(-1.87e-6) == "\u22121.87e\u221206"
    assert format_signed(0.0) == "0"
