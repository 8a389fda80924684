"""Texts and figures that try to leave the place where they are shown."""

from debiased_laplace.calibration.contents import DirectionSummary, HeldOutDifference, PosteriorSummary, SpectrumPoint

HOSTILE = (
    "<script>alert(1)</script>",
    "</title><style>*{display:none}</style>",
    '"><img src=//example.org/x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; &amp; &#60;",
    "$\\sigma^2$ {{ 7 * 7 }} {% raw %}",
    "]]></svg><STYLE>*{color:red}</STYLE>",
    "<meta http-equiv=refresh content='0;url=//example.org'>",
    "<form action=//example.org><input>",
    "a|b \\| *bold* _it_ [x](http://y) # h `c` ~~s~~",
    '=HYPERLINK("http://example.org")',
    "javascript:alert(1)",
    "模型 مرحبا 🎲",
    'comma, "quote"; more',
    "--><!-- x",
)
TEXT = " ".join(HOSTILE)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 90"><g id="a"><text>x</text></g><use href="#a"/></svg>'
BAD_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><STYLE>*{display:none}</STYLE><script>x()</script>'
    '<foreignObject><form action="//x"><img src="http://x"></form></foreignObject></svg>"><script>y()</script>'
)
SUMMARY = PosteriorSummary(
    facts={"class": TEXT, "parameters": 3254, "effective parameters": 312.4, TEXT: "x"},
    prior_precision=(40.0, 40.0),
    directions=(
        DirectionSummary(1, 4.0, 2.0, 1.0, 8.0),
        DirectionSummary(2, 2.0, 1.0, 0.0, 3.0),
        DirectionSummary(30, 0.01, 1.0, 0.5, 2.0),
        DirectionSummary(31, 0.01, 0.0, 0.0, 0.0),
    ),
    spectrum=tuple(SpectrumPoint(i, 1e4 / i**2) for i in range(1, 30)),
    held_out=HeldOutDifference("map", -120.0, 30.0, -178.8, -61.2, 6e-5, "closer", 256),
    notes=(TEXT,),
)
