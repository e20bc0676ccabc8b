"""Names, prompts and descriptions of the synthetic community."""

from pocket.vocabulary import file_stem, recolour


def test_file_stem_drops_markup_and_paths():
    assert file_stem("Inkwell Drift", "v1.1") == "inkwellDrift_v11"
    assert file_stem("<b>Bold</b> Bloom &amp; Co", "v2") == "boldBloomCo_v2"
    assert file_stem("../../etc/passwd", "1.0") == "etcPasswd_10"


def test_recolour_changes_one_colour_only():
    class First:
        def choice(self, options):
            return options[0]

    assert recolour(First(), "a (green cat:1.2), red roofs") == "a (orange cat:1.2), red roofs"
