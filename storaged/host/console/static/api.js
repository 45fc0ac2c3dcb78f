// What the page asks of the host: one stream of events, and a few calls.

let token = "";
export const SILENT_MS = 12000;

export async function session() {
  const answer = await fetch("/api/session");
  if (!answer.ok) throw new Error(await reason(answer));
  const said = await answer.json();
  token = said.token;
  return said;
}

async function reason(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return `storaged-host answered ${answer.status} ${answer.statusText}`;
  }
}

// Resolves to what the host answered; throws an Error with a sentence for the person who asked.
export async function post(path, body = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json", "x-storaged-token": token },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("storaged-host did not answer, and whether it has begun is not known. Wait until the numbers move again.");
  }
  if (!answer.ok) throw new Error(await reason(answer));
  return answer.json();
}

// Calls `heard` with every event, `silent` when the line is dead (with a reason if there is one), `stranger` with what
// the session says when somebody has to sign in (again).
export function listen({ heard, silent, stranger }) {
  let source, timer;
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      silent();
      again();
    }, SILENT_MS);
  };
  const again = () => {
    source?.close();
    clearTimeout(timer);
    timer = setTimeout(open, 2000);
  };
  const open = async () => {
    try {
      const said = await session();
      if (said.login) return stranger(said);
      if (said.full) {
        silent(said.full);
        return again();
      }
    } catch {
      silent();
      return again();
    }
    source = new EventSource("/api/events");
    source.onmessage = (event) => {
      wait();
      heard(JSON.parse(event.data));
    };
    source.onerror = () => {
      silent();
      again();
    };
    wait();
  };
  open();
}
