"""Ask a running server: its base, a run and the run's best checkpoint; chat, streamed chat and completions.
Run: lorakit serve work/base --watch work/runs, and then: python examples/serve_client.py --run sql"""

import argparse

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--run", default="sql")
    parser.add_argument("--question", default="what is the capital of france?")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key="-")
    messages = [{"role": "user", "content": arguments.question}]

    models = [model.id for model in client.models.list()]
    print("models:", ", ".join(models))

    for model in (models[0], arguments.run, f"{arguments.run}@best"):  # the base stands first
        raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, temperature=0)
        print(f"{model}: {raw.parse().choices[0].message.content}  [{raw.headers['x-lorakit-revision']}]")

    print("streamed: ", end="")
    for part in client.chat.completions.create(model=arguments.run, messages=messages, temperature=0, stream=True):
        print(part.choices[0].delta.content or "", end="", flush=True)

    prompt = f"question: {arguments.question}\nanswer: "
    answer = client.completions.create(model=arguments.run, prompt=prompt, temperature=0, max_tokens=80)
    print(f"\ncompleted: {answer.choices[0].text}  [{answer.model}]")


if __name__ == "__main__":
    main()
