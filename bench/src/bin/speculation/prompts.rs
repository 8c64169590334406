//! What is asked: answers that quote their prompt, and answers that do not. Short, so that a small model's greedy answers do
//! what they are asked to.

/// Edited code and quoted text.
pub const QUOTING: [&str; 10] = [
    "Rename the variable `total` to `amount` in this code and print the whole code.\n\n```python\ndef invoice(items, rate):\n    total = 0\n    for item in items:\n        price = item.price * item.count\n        if item.reduced:\n            price = price * 0.9\n        total = total + price\n    tax = total * rate\n    return round(total + tax, 2)\n\ndef average(items):\n    if len(items) == 0:\n        return None\n    return invoice(items, 0.0) / len(items)\n```",
    "Add a docstring to each function of this code. Print the whole code.\n\n```python\ndef read_words(path):\n    words = {}\n    with open(path, encoding=\"utf-8\") as file:\n        for line in file:\n            for word in line.lower().split():\n                words[word] = words.get(word, 0) + 1\n    return words\n\ndef most_common(words, count):\n    pairs = sorted(words.items(), key=lambda pair: pair[1], reverse=True)\n    return [word for word, _ in pairs[:count]]\n```",
    "Correct the one spelling mistake in this text and repeat the whole text.\n\nThe harbour of Aldworth was built in 1742 by two brothers who traded in wool and salt. Its stone pier is ninety metres long and ends in a small round tower. In the winter of 1881 a storm took the roof off the tower, and for eleven years no lamp was lit there. Fishermen steered by the windows of the inn instead. Today the tower is a museum, and the lamp is lit every evening by the daugther of the last keeper.",
    "Copy the text exactly.\n\nThe night train from Vienna stops for nine minutes in a small town at the border. The locomotive is changed there, because the wires on the other side carry another current. In summer a woman walks along the platform with a basket and sells cherries through the windows. Regular travellers know her by name and have their coins ready. When the new locomotive pulls, the lamps in the carriages go dark for a moment, and somebody always laughs.",
    "Correct the grammar of this text and repeat the whole text.\n\nMy grandfather repaired clocks in a narrow shop behind the town hall. He have three magnifying glasses, one for each size of screw, and a cat that slept in the drawer with the springs. People brought him watches that had stopped on the day of a wedding or a funeral, and sometimes they asked him not to make them go again. He cleaned these ones too, set the hands back to the hour at which they had stopped, and took no money for it.",
    "Copy the text exactly and then write one sentence that says what it is about.\n\nBees find their way by the sun. When a scout has found a meadow in bloom, she returns to the hive and dances on the comb: the angle of her dance to the vertical is the angle between the meadow and the sun, and the length of each run tells how far it is. Other bees follow her in the dark, touch her with their antennae, and fly out to the same meadow without having seen it. On cloudy days they read the sun's place from the light of a small patch of blue sky.",
    "Change the type of `count` from u32 to u64 in this code. Print the whole code.\n\n```rust\npub struct Bucket {\n    name: String,\n    count: u32,\n    limit: usize,\n}\n\nimpl Bucket {\n    pub fn new(name: &str, limit: usize) -> Self {\n        Self { name: name.to_string(), count: 0, limit }\n    }\n\n    pub fn take(&mut self) -> bool {\n        if self.limit == 0 {\n            return false;\n        }\n        self.count += 1;\n        self.limit -= 1;\n        true\n    }\n}\n```",
    "Summarise the article in one sentence. Then repeat its first paragraph word for word.\n\nA team of divers has found the wreck of the steamship Caroline in forty metres of water off the coast of Cornwall. The ship left Bristol in March 1879 with a load of tin, two hundred barrels of flour and a piano that had been ordered by the mayor of Lisbon. She was last seen by the keeper of the Longships light, who noted that she sat deep in the water and burned too much coal.\n\nThe divers have brought up a bell and a part of the piano.",
    "Rename the function `area` to `surface` in this code and print the whole code.\n\n```python\nclass Shape:\n    def __init__(self, name, sides):\n        self.name = name\n        self.sides = sides\n\n    def area(self):\n        raise NotImplementedError(self.name)\n\nclass Rectangle(Shape):\n    def __init__(self, width, height):\n        super().__init__(\"rectangle\", 4)\n        self.width = width\n        self.height = height\n\n    def area(self):\n        return self.width * self.height\n```",
    "Replace `fetch` by `axios.get` in this code and print all of it.\n\n```javascript\nasync function loadUser(id) {\n  const response = await fetch(`/api/users/${id}`);\n  if (!response.ok) {\n    throw new Error(`user ${id}: ${response.status}`);\n  }\n  const user = await response.json();\n  user.name = user.firstName + \" \" + user.lastName;\n  user.joined = new Date(user.joinedAt);\n  return user;\n}\n\nasync function loadOrders(userId) {\n  const response = await fetch(`/api/orders?user=${userId}`);\n  return response.ok ? response.json() : [];\n}\n```",
];

/// Answers of the model's own.
pub const FREE: [&str; 10] = [
    "Why is the sky blue?",
    "Tell a short story about a clockmaker who loses his glasses.",
    "What should I think about before I buy a used bicycle?",
    "Compare trains and aeroplanes for a journey of 600 kilometres.",
    "What happens in a volcano before it erupts?",
    "Give me ideas for a birthday party for a ten-year-old who likes space.",
    "What is the difference between weather and climate?",
    "Write a letter to a friend about your first week in a new city.",
    "How does bread rise?",
    "How was paper made in ancient China?",
];
