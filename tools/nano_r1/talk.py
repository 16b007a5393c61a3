"""Small talk and refusals: what is asked, and the one reply that each kind gets in each language."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    """The thought and the answer to one kind of remark."""

    thought: str
    answer: str


REPLIES = {
    ("greeting", "en"): Reply("a greeting", "Hello! Give me a sum, or a list to sort."),
    ("thanks", "en"): Reply("thanks", "You are welcome!"),
    ("who", "en"): Reply("about me", "I am nano-R1, a tiny model that reasons step by step."),
    ("can", "en"): Reply(
        "what i can do", "I can add, subtract, multiply by one digit, compare, reverse and sort."
    ),
    ("how", "en"): Reply("how i am", "I am fine, thank you! Give me a sum, or a list to sort."),
    ("bye", "en"): Reply("a farewell", "Goodbye!"),
    ("refusal", "en"): Reply(
        "not a task i know", "Sorry, I can not do that. I am a tiny model for sums and lists."
    ),
    ("greeting", "ja"): Reply("a greeting", "こんにちは！計算や並べ替えができます。"),
    ("thanks", "ja"): Reply("thanks", "どういたしまして！"),
    ("who", "ja"): Reply("about me", "私はnano-R1です。順に考える小さなモデルです。"),
    ("can", "ja"): Reply("what i can do", "足し算、引き算、一桁の掛け算、比較、逆順、並べ替えができます。"),
    ("how", "ja"): Reply("how i am", "元気です！計算や並べ替えができます。"),
    ("bye", "ja"): Reply("a farewell", "さようなら！"),
    ("refusal", "ja"): Reply(
        "not a task i know", "すみません、それはできません。計算と並べ替えの小さなモデルです。"
    ),
}

# fmt: off
REMARKS = {
    ("greeting", "en"): (
        "hello", "hi", "hey", "good morning", "good evening", "good afternoon", "hello there", "hi there",
        "hey there", "greetings", "hello nano", "hi nano-r1", "good day", "howdy", "nice to meet you",
        "hello again", "yo", "hi friend", "hello my friend", "hey you",
    ),
    ("thanks", "en"): (
        "thanks", "thank you", "thanks a lot", "thank you very much", "many thanks", "great, thanks",
        "thank you so much", "thx", "ok thanks", "nice, thank you", "cheers", "perfect, thanks",
        "thanks for your help", "thank you for the answer", "well done", "good job", "great work",
    ),
    ("who", "en"): (
        "who are you", "what are you", "what is your name", "what's your name", "tell me about yourself",
        "are you a robot", "are you human", "who made you", "introduce yourself", "what model are you",
        "are you deepseek", "who is this", "are you an ai", "which model is this", "say who you are",
        "are you r1", "do you have a name", "how big are you",
    ),
    ("can", "en"): (
        "what can you do", "what do you know", "how can you help me", "help", "what are you good at",
        "what can i ask you", "show me what you can do", "can you help me", "what tasks can you do",
        "tell me what you can do", "what should i ask", "how do i use you", "i need help",
        "what are your skills",
    ),
    ("how", "en"): (
        "how are you", "how are you doing", "how is it going", "how do you do", "what's up", "are you ok",
        "how are you today", "how do you feel", "how are things", "is all well",
    ),
    ("bye", "en"): (
        "bye", "goodbye", "bye bye", "see you", "see you later", "good night", "farewell", "i have to go",
        "that is all", "see you tomorrow", "have a nice day",
    ),
    ("greeting", "ja"): (
        "こんにちは", "おはよう", "おはようございます", "こんばんは", "はじめまして", "やあ", "どうも",
        "もしもし",
    ),
    ("thanks", "ja"): (
        "ありがとう", "ありがとうございます", "どうもありがとう", "助かりました", "感謝します",
        "サンキュー",
    ),
    ("who", "ja"): (
        "あなたは誰ですか", "あなたは誰", "お名前は", "名前は何ですか", "自己紹介して", "君は誰",
        "何のモデルですか",
    ),
    ("can", "ja"): (
        "何ができますか", "何ができるの", "使い方を教えて", "手伝って", "助けて", "できることは何ですか",
    ),
    ("how", "ja"): ("お元気ですか", "元気", "調子はどう", "元気ですか"),
    ("bye", "ja"): ("さようなら", "またね", "おやすみ", "じゃあね", "バイバイ", "また明日"),
}
REMARK_OPENINGS = ("", "", "", "", "oh, ", "well, ", "ok, ", "hey, ", "so ")
REMARK_CLOSINGS = ("", "", "", "!", ".", "?", "!!", " :)", " ...", ", nano", ", friend", "\n")
JA_REMARK_CLOSINGS = ("", "", "。", "！", "!", "？", "ね", "。よろしく")

REFUSED_TOPICS = {
    "place": (
        "france", "japan", "italy", "spain", "germany", "china", "brazil", "india", "canada", "egypt",
        "peru",
    ),
    "city": (
        "tokyo", "paris", "london", "rome", "berlin", "new york", "osaka", "madrid", "kyoto", "boston",
    ),
    "subject": (
        "love", "the sea", "cats", "history", "gravity", "black holes", "music", "the moon", "physics",
        "war", "quantum computers", "football", "dinosaurs", "winter", "photosynthesis", "money",
    ),
    "person": (
        "einstein", "mozart", "napoleon", "shakespeare", "newton", "the president", "picasso", "cleopatra",
    ),
    "text": (
        "a poem", "a story", "an essay", "a song", "a letter", "a joke", "a haiku", "a report", "an email",
    ),
    "language": ("french", "german", "japanese", "spanish", "english", "chinese", "latin"),
    "program": ("python", "java", "rust", "html", "sql", "a shell script", "c++"),
    "food": ("pizza", "soup", "sushi", "a cake", "pasta", "bread", "curry"),
    "word": ("strawberry", "banana", "house", "garden", "love", "mountain", "window", "water"),
}
REFUSED = (
    "what is the capital of {place}", "where is {place}", "how many people live in {place}",
    "tell me about {place}", "what is the weather in {city}", "how far is {city} from {place}",
    "plan a trip to {city}", "how do i get to {city}", "explain {subject}", "what is {subject}",
    "write {text} about {subject}", "tell me {text} about {subject}", "tell me {text}", "write {text}",
    "write {text} for {person}", "what do you think about {subject}", "why is {subject} important",
    "who is {person}", "who was {person}", "when was {person} born", "translate {word} into {language}",
    "how do you say {word} in {language}", "do you speak {language}", "write code in {program}",
    "can you write {program}", "how do i sort a list in {program}", "learn {program}",
    "how do i cook {food}", "give me a recipe for {food}", "i am hungry, what about {food}",
    "do you like {food}", "how many letters are in {word}", "how many r's are in {word}", "spell {word}",
    "what rhymes with {word}", "what does {word} mean", "draw {word}", "what time is it",
    "what day is it today", "what is the meaning of life", "play {text}", "sing {text}",
    "who won the world cup", "what is {n} divided by {m}", "{n}/{m}", "{n} / {m}", "divide {n} by {m}",
    "the square root of {n}", "is {n} a prime number", "{n} percent of {m}", "sin({n})",
    "solve x + {n} = {m}", "what is {n} squared", "what happened in {n}", "do you love me",
    "are you happy", "tell me something", "what is the news", "buy {food}", "read my mail",
    "is {subject} real", "describe {city}", "summarize {text}", "what is the best {food}", "open the door",
    "i like {subject}", "i am from {place}",
)
REFUSED_JA = (
    "{city}の天気は", "{place}の首都はどこですか", "{subject}について教えて", "{subject}とは何ですか",
    "{text}を書いて", "{person}は誰ですか", "今日は何曜日ですか", "今何時ですか", "{food}の作り方を教えて",
    "{subject}の{text}を書いて", "{n}割る{m}は", "{n}÷{m}", "{program}でコードを書いて",
    "英語に訳して: {subject}", "好きな食べ物は何ですか", "歌って", "{city}への行き方は",
    "{place}はどこですか", "{subject}が好きです", "{n}の平方根は", "面白い話をして", "何か話して",
)
REFUSED_JA_TOPICS = {
    "city": ("東京", "大阪", "京都", "パリ", "ロンドン", "札幌", "福岡"),
    "place": ("日本", "フランス", "中国", "インド", "イタリア", "ドイツ"),
    "subject": ("歴史", "音楽", "愛", "重力", "宇宙", "月", "海", "猫"),
    "text": ("詩", "物語", "手紙", "歌", "日記", "作文"),
    "person": ("織田信長", "モーツァルト", "ニュートン", "首相"),
    "food": ("寿司", "カレー", "ピザ", "ケーキ", "パン"),
    "program": ("Python", "Java", "C"),
}
