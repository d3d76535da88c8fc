"""A chat model's own answers: text for prediction depths to be trained on, and measured on.

    python tests/benchmarks/chat_answers.py FOLDER answers.jsonl [--answers N] [--tokens N]

Every template is asked of every topic, in the ChatML form of SmolLM2, Qwen and others, and the
model of FOLDER answers greedily. A line of the file holds one conversation. Lines that are there
already are kept: a run that was stopped goes on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from equinox_mtp import pretrained, speculative

AT_ONCE = 64
TEMPLATES = (
    "Explain {} to a child.",
    "Write a short paragraph about {}.",
    "What are the main advantages and disadvantages of {}?",
    "Give me five facts about {}.",
    "Describe the history of {} in a few sentences.",
    "What should a beginner know about {}?",
    "Write a short story in which {} plays a role.",
    "Why is {} important?",
)
TOPICS = (
    "photosynthesis, gravity, electricity, magnetism, evolution, the water cycle, volcanoes, "
    "earthquakes, tornadoes, the moon, the solar system, black holes, the ocean, coral reefs, "
    "rainforests, deserts, glaciers, rivers, mountains, islands, dinosaurs, whales, dolphins, "
    "elephants, penguins, owls, eagles, bees, butterflies, spiders, snakes, frogs, wolves, "
    "bears, cats, dogs, horses, cows, chickens, fish, trees, flowers, mushrooms, wheat, rice, "
    "corn, potatoes, tomatoes, apples, bananas, oranges, grapes, bread, cheese, chocolate, "
    "coffee, tea, milk, sugar, salt, pizza, pasta, soup, salad, breakfast, football, "
    "basketball, tennis, swimming, running, cycling, chess, yoga, hiking, skiing, dancing, "
    "painting, sculpture, photography, music, the piano, the guitar, the violin, opera, jazz, "
    "poetry, novels, theatre, cinema, television, radio, newspapers, the internet, computers, "
    "smartphones, robots, artificial intelligence, machine learning, databases, the Python "
    "language, the C language, compilers, operating systems, encryption, video games, cars, "
    "trains, airplanes, ships, bicycles, rockets, satellites, bridges, skyscrapers, houses, "
    "roads, solar power, wind power, nuclear power, batteries, oil, coal, steel, glass, "
    "plastic, paper, gold, diamonds, water, air, fire, ice, light, sound, heat, the heart, "
    "the brain, the lungs, the skin, sleep, exercise, nutrition, vaccines, medicine, surgery, "
    "hospitals, schools, universities, libraries, museums, parks, banks, money, taxes, trade, "
    "insurance, democracy, elections, laws, courts, the police, armies, treaties, maps, "
    "calendars, clocks, numbers, algebra, geometry, statistics, probability, logic, "
    "philosophy, psychology, economics, history, geography, languages, writing, friendship, "
    "kindness, honesty, courage, patience, family, marriage, birthdays, holidays, travel, "
    "cooking, gardening, fishing, farming, recycling, climate change, weather, rain, snow, "
    "clouds, rainbows, the seasons, the Roman Empire, ancient Egypt, ancient Greece, the "
    "Renaissance, the Industrial Revolution, France, Japan, Brazil, India, China, Canada, "
    "Egypt, Italy"
)


def prompts(seed: int = 0) -> list[str]:
    """All of them, in an order that follows from the seed."""
    questions = [x.format(topic) for x in TEMPLATES for topic in TOPICS.split(", ")]
    np.random.default_rng(seed).shuffle(questions)
    return [f"<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant\n" for x in questions]


def main() -> None:
    """Writes the answers, a batch at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the released model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--answers", type=int, default=1600)
    parser.add_argument("--tokens", type=int, default=224, help="of an answer, at most")
    arguments = parser.parse_args()
    model, tokenizer = pretrained.load(arguments.folder)
    assert tokenizer is not None, "the folder has no tokenizer.json"
    end = tokenizer.token_to_id("<|im_end|>")
    questions = prompts()[: arguments.answers]
    encoded = [x.ids for x in tokenizer.encode_batch(questions)]
    width = max(map(len, encoded))
    done = len(arguments.out.read_text().splitlines()) if arguments.out.exists() else 0
    with arguments.out.open("a") as stream:
        for start in tqdm(range(done, len(questions), AT_ONCE), unit="batch"):
            rows = [encoded[i % len(encoded)] for i in range(start, start + AT_ONCE)]
            generation = speculative.generate(
                model,
                np.stack([np.pad(row, (0, width - len(row))) for row in rows]),
                np.array(list(map(len, rows))),
                max_new_tokens=arguments.tokens,
                num_drafts=0,
                eos_id=end,
            )
            tokens, lengths = np.asarray(generation.tokens), np.asarray(generation.lengths)
            count = min(AT_ONCE, len(questions) - start)
            texts = tokenizer.decode_batch(
                [list(map(int, row[:n])) for row, n in zip(tokens, lengths, strict=True)][:count],
                skip_special_tokens=False,
            )
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            stream.flush()


if __name__ == "__main__":
    main()
