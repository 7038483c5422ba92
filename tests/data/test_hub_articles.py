import random

from gpt_jax.data.hub import articles


def rows_of(raw):
    """The rows that the dataset makes of the raw file: its lines, blank ones empty."""
    return [line if line.strip() else '' for line in raw.splitlines(keepends=True)]


ARTICLES = [
    ' = First article = \n \n It begins . \n = = Section = = \n \n More of it . \n = = = Subsection = = = \n \n',
    ' = E = mc2 = \n \n = Not a title = \n An equation : \n = 5 @.@ 0 = \n \n The end . \n \n \n',
    ' = B = \n \n',
]


def test_articles_come_back_as_the_raw_file_has_them():
    raw = ' \n' + ''.join(ARTICLES)
    assert list(articles(rows_of(raw))) == ARTICLES
    assert ''.join(articles(rows_of(raw))) == raw.removeprefix(' \n')


def test_any_order_of_articles_is_restored():
    rng = random.Random(0)
    for _ in range(20):
        chosen = rng.choices(ARTICLES, k=5)
        assert list(articles(rows_of(''.join(chosen)))) == chosen


def test_text_before_the_first_title_and_a_title_at_the_end_are_kept():
    assert list(articles([' loose line \n', '', ' = Title = \n', '', ' text \n'])) == [
        ' loose line \n \n',
        ' = Title = \n \n text \n',
    ]
    assert list(articles(['', ' = Title = \n'])) == [' \n = Title = \n']
    assert list(articles([' = Title = \n'])) == [' = Title = \n']
    assert list(articles(['', ''])) == []
