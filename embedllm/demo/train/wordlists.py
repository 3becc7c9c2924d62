"""Word lists from which the synthetic dialogues draw their cities, people, words and facts. Data only."""

from __future__ import annotations


def _words(text: str, separator: str | None = None) -> list[str]:
    return [" ".join(word.split()) for word in text.split(separator)]


CITIES = _words(
    """
    Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Athens Oslo Stockholm Helsinki
    Copenhagen Budapest Brussels Amsterdam Zurich Geneva Milan Naples Turin Florence Venice Barcelona Valencia
    Seville Porto Lyon Nice Marseille Hamburg Munich Cologne Dresden Leipzig Krakow Gdansk Riga Vilnius
    Tallinn Sofia Bucharest Belgrade Zagreb Ljubljana Istanbul Ankara Cairo Tunis Lagos Nairobi Accra Dakar
    Pretoria Durban Tokyo Osaka Kyoto Nagoya Sapporo Seoul Busan Beijing Shanghai Shenzhen Taipei Hanoi
    Bangkok Manila Jakarta Singapore Mumbai Delhi Chennai Kolkata Dhaka Karachi Lahore Tehran Baghdad Dubai
    Doha Riyadh Amman Beirut Sydney Melbourne Perth Brisbane Auckland Wellington Toronto Montreal Vancouver
    Ottawa Calgary Boston Chicago Seattle Denver Dallas Houston Austin Phoenix Atlanta Miami Detroit Portland
    Havana Lima Bogota Quito Santiago Caracas Montevideo Brasilia Recife Salvador Cardiff Glasgow Edinburgh
    Belfast Leeds Bristol York Bergen Malmo Turku Odense Basel Bern Graz Linz Ghent Antwerp Utrecht Rotterdam
    Bordeaux Toulouse Nantes
    """
)
PEOPLE = _words(
    """
    Anna Ben Carla David Emma Felix Grace Hugo Ines Jack Karen Leo Maria Nina Oscar Paula Quentin Rosa Sam
    Tina Umar Vera Will Xenia Yusuf Zoe Alice Bob Clara Daniel Ella Frank Gina Henry Iris Jonas Kate Liam Mona
    Noah Olga Peter Rita Simon Tara Uma Victor Wendy Yara Zack Amir Bella Chen Diego Elif Farid Greta Hana
    Ivan Julia Kofi Lena Mateo Nora Omar Priya Rafael Sofia Tomas Ursula Viktor Walter Yuki Adam Bruno Celia
    Dora Erik Fiona George Helen Igor Jane Kurt Laura Mark Nick Otto Petra Ralph Sara Theo Vince Wanda
    """
)
WORDS = _words(
    """
    apple bridge candle desert engine forest garden hammer island jungle kitchen ladder mirror needle orange
    pencil rabbit silver table umbrella valley window yellow zebra anchor basket castle dragon eagle feather
    guitar harbor insect jacket kettle lemon marble night ocean planet queen river summer tower uncle violin
    winter airport banana camera dinner energy finger glass honey image jelly king letter money number onion
    paper quiet radio sugar train unit voice water bread chair dream earth flower green house idea juice knife
    light music north olive piano quick robot stone tiger upper video white young zero actor beach cloud dance
    elbow field ghost heart index joker label maple novel opera pearl ranch salad tulip vapor wagon amber
    blaze coral drift ember flame grain haste ivory jewel karma lunar magic noble orbit prism quartz ridge
    solar topaz urban vivid wheat acorn badge cabin delta event fable giant hotel input joint koala lemur
    metal nylon
    """
)
CURRENCIES = _words("USD EUR GBP JPY CHF CAD AUD SEK NOK DKK PLN CZK HUF TRY INR CNY KRW BRL MXN ZAR SGD NZD")
LANGUAGES = _words(
    """
    French German Spanish Italian Dutch Polish Czech Swedish Danish Finnish Greek Turkish Arabic Hindi Korean
    Japanese Chinese Russian Welsh Irish Latin Swahili
    """
)
SYMBOLS = _words("AAPL MSFT GOOG AMZN NVDA INTC AMD IBM ORCL CSCO TSLA META NFLX SAP SONY NOK SHEL UBS")
TOPICS = _words(
    """
    solar panels | jazz history | bread baking | chess openings | black holes | river otters | tea ceremonies
    | city gardens | electric cars | mountain climbing | ancient Rome | deep sea fish | paper planes | rain
    forests | wind power | violin makers | maple syrup | sleep science | space probes | train timetables |
    coffee beans | quantum physics | bird songs | steam engines | coral reefs | pasta recipes | football rules
    | desert plants | ice hockey | modern art | honey bees | old castles | film music | number theory | street
    food | sea turtles | winter sports | stone bridges | graph theory | card tricks | wild horses | silk roads
    """,
    "|",
)
WEATHER = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear"]
SUBJECTS = [
    "account",
    "station",
    "ticket",
    "planet",
    "recipe",
    "sensor",
    "order",
    "invoice",
    "player",
    "server",
    "book",
]
SUBJECTS += [
    "song",
    "lamp",
    "door",
    "robot",
    "file",
    "user",
    "message",
    "counter",
    "camera",
    "report",
    "garden",
    "score",
]
VERBS = [
    "get",
    "set",
    "find",
    "open",
    "close",
    "add",
    "remove",
    "list",
    "check",
    "update",
    "read",
    "count",
    "start",
    "stop",
]
FIELDS = [
    "name",
    "value",
    "number",
    "label",
    "level",
    "input",
    "key",
    "item",
    "text",
    "count",
    "title",
    "target",
    "mode",
]

MODULES = {  # what one wants to do -> the standard library module for it
    "parse JSON": "json",
    "work with dates": "datetime",
    "match regular expressions": "re",
    "copy files": "shutil",
    "run a subprocess": "subprocess",
    "parse command line arguments": "argparse",
    "read CSV files": "csv",
    "make random numbers": "random",
    "write log messages": "logging",
    "run threads": "threading",
    "write asynchronous code": "asyncio",
    "handle paths": "pathlib",
    "compute square roots": "math",
    "hash data": "hashlib",
    "compress data with gzip": "gzip",
    "read zip archives": "zipfile",
    "send email": "smtplib",
    "open sockets": "socket",
    "use SQLite": "sqlite3",
    "measure time": "time",
    "write unit tests": "unittest",
    "copy objects": "copy",
    "serialize objects": "pickle",
    "make temporary files": "tempfile",
    "count items": "collections",
    "chain iterators": "itertools",
    "cache function results": "functools",
    "parse XML": "xml",
    "fetch a URL": "urllib",
    "encode base64": "base64",
    "define enumerations": "enum",
    "define data classes": "dataclasses",
    "use a heap": "heapq",
    "search a sorted list": "bisect",
    "compare texts": "difflib",
    "wrap text": "textwrap",
    "trace memory": "tracemalloc",
    "parse TOML": "tomllib",
    "inspect objects": "inspect",
    "use weak references": "weakref",
}
BUILTINS = {  # built-in function -> what it does
    "len": "returns the number of items in an object",
    "print": "writes text to the standard output",
    "range": "makes a sequence of integers",
    "sorted": "returns a new sorted list",
    "sum": "adds up the items of an iterable",
    "abs": "returns the absolute value of a number",
    "max": "returns the largest item",
    "min": "returns the smallest item",
    "open": "opens a file and returns a file object",
    "zip": "pairs up the items of several iterables",
    "enumerate": "numbers the items of an iterable",
    "map": "applies a function to every item",
    "filter": "keeps the items for which a function is true",
    "isinstance": "checks whether an object has a type",
    "type": "returns the type of an object",
    "repr": "returns a printable form of an object",
    "reversed": "returns the items in reverse order",
    "any": "is true when some item is true",
    "all": "is true when every item is true",
    "round": "rounds a number",
    "chr": "returns the character for a code point",
    "ord": "returns the code point of a character",
    "input": "reads a line from the user",
    "hash": "returns the hash of an object",
    "id": "returns the identity of an object",
    "dir": "lists the names in an object",
    "callable": "tells whether an object can be called",
    "iter": "returns an iterator",
    "next": "returns the next item of an iterator",
    "getattr": "reads an attribute by name",
}
