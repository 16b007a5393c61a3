"""What users say: frames and phrases per task, English and Japanese.

A prompt is frame(phrase) between an opening and a closing, in one of several styles of capitals and spaces.
`{a}`, `{b}` are the operands, `{list}` the items, `{p}` a noun phrase, `{v}` an imperative.
"""

# fmt: off
NOUN_FRAMES = (
    "{p}", "{p} =", "{p}=", "{p} = ?", "what is {p}", "what's {p}", "whats {p}", "calculate {p}",
    "compute {p}", "find {p}", "work out {p}", "tell me {p}", "give me {p}", "how much is {p}",
    "evaluate {p}", "solve {p}", "i need {p}", "i want to know {p}", "do you know {p}", "{p} is what",
    "what does {p} equal", "what do you get for {p}", "can you compute {p}", "could you work out {p}",
    "show me {p}", "say what {p} is", "help me find {p}", "can you tell me {p}",
    "i would like to know {p}", "determine {p}",
)
VERB_FRAMES = (
    "{v}", "can you {v}", "could you {v}", "i want you to {v}", "help me {v}", "i need to {v}",
    "let's {v}", "would you {v}", "try to {v}", "how do i {v}", "i would like you to {v}",
    "you should {v}", "will you {v}",
)
OPENINGS = (
    "", "", "", "", "", "please ", "hey, ", "hi, ", "ok, ", "so ", "now ", "question: ", "hello! ",
    "ok now ",
)
CLOSINGS = (
    "", "", "", "", "?", "?", ".", "!", " please", ", please", " ?", " thanks", " step by step",
    ". put the answer in a box", ". think step by step", " for me", "\n", ", thank you",
)
JA_NOUN_FRAMES = (
    "{p}", "{p}は", "{p}は何ですか", "{p}を計算して", "{p}を計算してください", "{p}を求めて",
    "{p}を求めなさい", "{p}を教えて", "{p}を教えてください", "{p}はいくつ", "{p}はいくつですか",
    "{p}の答えは", "{p}はいくら", "{p}=", "次を計算: {p}", "{p}をお願い",
)
JA_VERB_FRAMES = ("{v}", "{v}ください", "{v}ほしい", "{v}くれますか", "{v}ね", "{v}みて")
JA_OPENINGS = ("", "", "", "", "では、", "次に、", "問題: ", "ねえ、", "すみません、")
JA_CLOSINGS = ("", "", "", "。", "？", "?", "！", "、お願いします", "。考えてください")

ADD_NOUNS = (
    "{a}+{b}", "{a} + {b}", "{a} +{b}", "{a} plus {b}", "the sum of {a} and {b}", "{a} and {b} together",
    "{a} added to {b}", "the total of {a} and {b}", "{a} and {b} added up", "the result of {a} + {b}",
    "the value of {a}+{b}", "the answer to {a} + {b}", "{a} increased by {b}",
    "the result of adding {a} and {b}",
)
ADD_VERBS = (
    "add {a} and {b}", "add {a} to {b}", "sum {a} and {b}", "add up {a} and {b}", "add {a} {b}",
    "add together {a} and {b}", "put {a} and {b} together", "add {a}, {b}", "do {a} + {b}",
)
ADD_JA_NOUNS = (
    "{a}+{b}", "{a} + {b}", "{a}たす{b}", "{a}と{b}の和", "{a}と{b}の合計", "{a}足す{b}", "{a}プラス{b}",
    "{a}に{b}を足した数",
)
ADD_JA_VERBS = ("{a}と{b}を足して", "{a}に{b}を足して", "{a}+{b}を計算して")

SUBTRACT_NOUNS = (
    "{a}-{b}", "{a} - {b}", "{a} -{b}", "{a} minus {b}", "the difference of {a} and {b}",
    "the difference between {a} and {b}", "{a} less {b}", "{a} take away {b}", "the result of {a} - {b}",
    "the value of {a}-{b}", "the answer to {a} - {b}", "{a} decreased by {b}",
    "the result of subtracting {b} from {a}", "{a} without {b}",
)
SUBTRACT_VERBS = (
    "subtract {b} from {a}", "take {b} from {a}", "take away {b} from {a}", "remove {b} from {a}",
    "deduct {b} from {a}", "do {a} - {b}",
)
SUBTRACT_JA_NOUNS = (
    "{a}-{b}", "{a} - {b}", "{a}ひく{b}", "{a}と{b}の差", "{a}引く{b}", "{a}マイナス{b}",
    "{a}から{b}を引いた数",
)
SUBTRACT_JA_VERBS = ("{a}から{b}を引いて", "{a}-{b}を計算して")

MULTIPLY_NOUNS = (
    "{a}*{b}", "{a} * {b}", "{a} x {b}", "{a}x{b}", "{a} times {b}", "{a}×{b}", "{a} × {b}",
    "the product of {a} and {b}", "{a} multiplied by {b}", "the result of {a} * {b}",
    "the value of {a}*{b}", "the answer to {a} x {b}", "the result of multiplying {a} by {b}",
)
MULTIPLY_VERBS = (
    "multiply {a} by {b}", "multiply {a} and {b}", "multiply {a} with {b}", "take {a} times {b}",
    "do {a} * {b}",
)
MULTIPLY_JA_NOUNS = ("{a}*{b}", "{a}×{b}", "{a} × {b}", "{a}かける{b}", "{a}と{b}の積", "{a}掛ける{b}")
MULTIPLY_JA_VERBS = ("{a}に{b}を掛けて", "{a}×{b}を計算して")

COMPARE = (
    "which is {want}, {a} or {b}", "which number is {want}, {a} or {b}", "what is {want}, {a} or {b}",
    "{a} or {b}, which is {want}", "{a} or {b}: which one is {want}", "which is {want}: {a} or {b}",
    "compare {a} and {b}, which is {want}", "is {a} or {b} {want}", "which one is {want}, {a} or {b}",
    "of {a} and {b}, which is {want}", "tell me which is {want}, {a} or {b}",
    "find the {want} of {a} and {b}", "the {want} of {a} and {b}",
    "give me the {want} number of {a} and {b}", "{a} vs {b}, which is {want}",
    "{a} and {b}: which is {want}", "pick the {want} number: {a}, {b}",
    "what is the {want} number, {a} or {b}", "do you know which is {want}, {a} or {b}",
    "can you tell me which is {want}, {a} or {b}", "i want to know which is {want}, {a} or {b}",
    "between {a} and {b}, which is {want}", "choose the {want} of {a} and {b}",
    "which of {a} and {b} is {want}", "say which is {want}, {a} or {b}",
)
COMPARE_WANTS = {
    "larger": ("larger", "bigger", "greater", "higher"),
    "smaller": ("smaller", "lower"),
}
COMPARE_JA = (
    "{a}と{b}ではどちらが{want}", "{a}と{b}はどちらが{want}", "{a}と{b}、どっちが{want}",
    "{a}と{b}の{want}方は", "どちらが{want}ですか、{a}と{b}", "{a}と{b}を比べて、{want}方は",
    "{want}のは{a}と{b}のどちら", "{a}と{b}のうち{want}数は", "{want}方を教えて: {a}、{b}",
)
COMPARE_JA_WANTS = {
    "larger": ("大きい",),
    "smaller": ("小さい",),
}

REVERSE_VERBS = (
    "reverse {list}", "reverse the list {list}", "reverse this list: {list}", "reverse: {list}",
    "flip {list}", "turn around {list}", "write {list} backwards", "say {list} in reverse",
    "list {list} in reverse order", "reverse the order of {list}", "put {list} in reverse order",
    "write this in reverse order: {list}", "read {list} backwards", "flip the list {list}",
    "reverse these: {list}", "give me {list} backwards", "flip the order of {list}",
    "show {list} in reverse", "repeat {list} backwards", "reverse the items {list}",
)
REVERSE_JA = (
    "{list}を逆にして", "{list}を逆順にして", "{list}を逆から書いて", "{list}を反対にして",
    "次を逆順に: {list}", "{list}を逆の順番で教えて", "リスト{list}を逆にして", "逆順にして: {list}",
)

SORT_VERBS = (
    "sort {list}{order}", "sort the list {list}{order}", "sort these numbers: {list}{order}",
    "order {list}{order}", "sort the numbers {list}{order}", "put {list} in order{order}",
    "arrange {list}{order}", "put these numbers in order{order}: {list}",
    "arrange the numbers {list}{order}", "sort{order}: {list}", "write {list} in order{order}",
    "order these numbers{order}: {list}", "sort this list{order}: {list}", "give me {list} sorted{order}",
    "list {list}{order} in order", "arrange this list{order}: {list}", "show {list} sorted{order}",
    "order the list {list}{order}",
)
SORT_ORDERS = {
    "up": (
        "", "", "", " from small to large", " from smallest to largest", " ascending",
        " in ascending order", " from low to high", " smallest first", " in increasing order",
    ),
    "down": (
        " from large to small", " from largest to smallest", " descending", " in descending order",
        " from high to low", " largest first", " in decreasing order",
    ),
}
SORT_JA = (
    "{list}を{order}並べて", "{list}を{order}並べ替えて", "{order}並べて: {list}",
    "次の数を{order}並べて: {list}", "{list}を{order}ソートして", "リスト{list}を{order}並べて",
    "数{list}を{order}並べ替えて",
)
SORT_JA_ORDERS = {
    "up": ("小さい順に", "昇順に", ""),
    "down": ("大きい順に", "降順に"),
}

WORDS = (
    "cat", "dog", "fish", "bird", "cow", "pig", "horse", "sheep", "apple", "pear", "plum", "lemon",
    "peach", "red", "blue", "green", "black", "white", "pink", "sun", "moon", "star", "sky", "rain",
    "snow", "tree", "leaf", "rose", "book", "pen", "desk", "lamp", "door", "wall", "car", "bus", "train",
    "boat", "bike", "tea", "milk", "bread", "rice", "salt", "cake", "one", "two", "three", "four", "five",
    "six", "king", "queen", "north", "south", "east", "west", "Tokyo", "Paris", "Rome", "London", "Tom",
    "Anna", "Ben", "Mia", "Ken", "Yuki",
)
JA_WORDS = (
    "犬", "猫", "鳥", "魚", "牛", "馬", "赤", "青", "白", "黒", "春", "夏", "秋", "冬", "山", "川", "空",
    "海",
)

NAMES = (
    "Tom", "Anna", "Ben", "Mia", "Ken", "Yuki", "Sam", "Lisa", "Max", "Emma", "Leo", "Aya", "Jack", "Kate",
)
THINGS = (
    "apples", "books", "coins", "pens", "cards", "eggs", "stamps", "marbles", "cookies", "stickers",
    "balls",
)
JA_NAMES = ("太郎", "花子", "ケン", "ユキ", "アヤ", "トム")
JA_THINGS = ("りんご", "みかん", "たまご", "あめ", "ボール", "クッキー")

STORIES = {
    "add": (
        "{name} has {a} {thing} and {gets} {b} more. {ask}",
        "{name} had {a} {thing}, then {gets} {b} {thing}. {ask}",
        "there are {a} {thing} in a box and {b} {thing} on the table. how many {thing} are there in total",
        "{name} has {a} {thing}. {other} gives {name} {b} {thing}. {ask}",
        "{name} has {a} {thing} and {other} has {b} {thing}. how many {thing} do they have together",
        "a shop has {a} {thing} and {gets} {b} more. how many {thing} does the shop have now",
    ),
    "subtract": (
        "{name} has {a} {thing} and {loses} {b} of them. {ask_left}",
        "{name} had {a} {thing}, then {loses} {b} {thing}. {ask_left}",
        "there are {a} {thing} in a box. {name} {loses} {b} of them. how many {thing} are left",
        "{name} has {a} {thing}. {name} gives {b} {thing} to {other}. {ask_left}",
        "{name} has {a} {thing} and {other} has {b} {thing}. "
        "how many more {thing} does {name} have than {other}",
        "a shop has {a} {thing} and {loses} {b} of them. how many {thing} are left in the shop",
    ),
    "multiply": (
        "there are {a} boxes with {b} {thing} in each box. how many {thing} are there in total",
        "{name} has {a} bags of {b} {thing}. how many {thing} does {name} have in total",
        "{name} buys {a} packs. each pack has {b} {thing}. how many {thing} is that",
        "each box holds {b} {thing}. how many {thing} are in {a} boxes",
    ),
}
STORY_PARTS = {
    "gets": ("buys", "finds", "gets", "makes", "wins"),
    "loses": ("sells", "loses", "gives away", "uses", "drops"),
    "ask": (
        "how many {thing} does {name} have now", "how many {thing} does {name} have in total",
        "how many {thing} are there now", "how many is that in total",
    ),
    "ask_left": (
        "how many {thing} are left", "how many {thing} does {name} have left",
        "how many {thing} does {name} have now", "how many remain",
    ),
}
JA_STORIES = {
    "add": (
        "{name}は{thing}を{a}個持っています。{b}個{gets}。全部で何個ですか",
        "{thing}が{a}個あります。{b}個増えました。{thing}は何個ですか",
        "箱に{thing}が{a}個、机に{b}個あります。合わせて何個ですか",
    ),
    "subtract": (
        "{name}は{thing}を{a}個持っています。{b}個{loses}。残りは何個ですか",
        "{thing}が{a}個あります。{b}個{loses}。{thing}は何個残りますか",
        "{thing}が{a}個あります。{b}個減りました。残りは何個ですか",
    ),
    "multiply": (
        "{thing}が{b}個入った箱が{a}箱あります。全部で何個ですか",
        "1箱に{thing}が{b}個あります。{a}箱では何個ですか",
    ),
}
JA_STORY_PARTS = {
    "gets": ("買いました", "もらいました", "見つけました"),
    "loses": ("食べました", "あげました", "使いました"),
}
