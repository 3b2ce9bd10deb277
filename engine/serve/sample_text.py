"""A text with which tokenizers and models are compared: prose, numbers, code and other scripts."""

TEXT = """A palimpsest is a page whose first writing was scraped away so that it could be used again. What was \
written before can still be read beneath the new lines: ink bites into parchment, and monks were thrifty but not \
thorough. In 1906 J. L. Heiberg recognised a lost work of Archimedes under a Byzantine prayer book; it took until \
2008 - two world wars, one theft, and 2,000,000 US dollars later - to read most of it.

    def overwrite(page: list[str], text: str) -> list[str]:
        return [f"{old:.3}{new}" for old, new in zip(page, text)]  # 3 > 0

Nul n'est censé l'ignorer; 再利用された羊皮紙; ἀπὸ τοῦ πάλιν καὶ ψάω.
"""
