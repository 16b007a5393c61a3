"""The OpenAI protocol as data: requests, responses, errors, stream chunks. No web framework."""
