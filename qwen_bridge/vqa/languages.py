"""Number words from zero to ten in the languages of the embedded world.

Some words are shared (`uno`, `six`, `vier`, `tre`), as among real communities, so one
demonstration does not always tell which language is spoken.
"""

NUMBER_WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "english": "zero one two three four five six seven eight nine ten",
        "french": "zéro un deux trois quatre cinq six sept huit neuf dix",
        "german": "null eins zwei drei vier fünf sechs sieben acht neun zehn",
        "spanish": "cero uno dos tres cuatro cinco seis siete ocho nueve diez",
        "italian": "zero uno due tre quattro cinque sei sette otto nove dieci",
        "dutch": "nul een twee drie vier vijf zes zeven acht negen tien",
        "swedish": "noll ett två tre fyra fem sex sju åtta nio tio",
        "turkish": "sıfır bir iki üç dört beş altı yedi sekiz dokuz on",
        "indonesian": "nol satu dua tiga empat lima enam tujuh delapan sembilan sepuluh",
        "swahili": "sifuri moja mbili tatu nne tano sita saba nane tisa kumi",
    }.items()
}
