// Shows openapi.json: every operation, its fields and answers, and a form that sends it.
"use strict";

function element(tag, attributes, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

let components = {};

function resolve(schema) {
  const name = (schema.$ref || "").split("/").pop();
  return name ? components[name] : schema;
}

function typeOf(given) {
  const schema = resolve(given);
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typeOf))].join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `[${schema.items ? typeOf(schema.items) : "any"}]`;
  if (schema.type === "object") {
    return given.$ref ? given.$ref.split("/").pop() : `{${Object.keys(schema.properties || {}).join(", ")}}`;
  }
  return schema.type || "any";
}

function fields(given) {
  const schema = resolve(given);
  if (schema.anyOf) {
    const tables = schema.anyOf.map(fields).filter((table) => table);
    return tables.length > 1 ? element("div", {}, ...tables) : tables[0] || null;
  }
  if (!schema.properties) return null;
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties).map(([name, field]) => {
    const told = resolve(field);
    const fallback = field.default === undefined ? "" : ` Default: ${JSON.stringify(field.default)}.`;
    return element("tr", {},
      element("td", {}, element("code", { textContent: name }), required.has(name) ? " *" : ""),
      element("td", {}, element("code", { textContent: typeOf(field) })),
      element("td", { textContent: (field.description || told.description || "") + fallback }));
  });
  return element("table", {}, ...rows);
}

function exampleOf(operation) {
  const content = operation.requestBody && operation.requestBody.content["application/json"];
  const schema = content && resolve(content.schema);
  const examples = schema && (schema.anyOf ? resolve(schema.anyOf[0]) : schema).examples;
  return examples ? JSON.stringify(examples[0], null, 2) : "";
}

function urlOf(path, operation) {
  const inPath = (operation.parameters || []).find((parameter) => parameter.in === "path");
  const name = inPath && inPath.schema.enum[0];
  const relative = path.replace("{name}", name).replace(/^\//, "");
  return new URL(relative, new URL("./", document.baseURI)).href;
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function curlOf(method, url, body, asksKey) {
  const start = `curl -s ${shellQuoted(url)}${asksKey ? ' -H "authorization: Bearer $KEY"' : ""}`;
  if (method === "get") return start;
  const compact = JSON.stringify(JSON.parse(body));
  return `${start} -H 'content-type: application/json' -d ${shellQuoted(compact)}`;
}

function shortened(text) {
  return text.length > 4000 ? `${text.slice(0, 4000)}… (${text.length} characters)` : text;
}

async function send(method, url, body, output) {
  const options = method === "get" ? {} : { method: "POST", body, headers: { "content-type": "application/json" } };
  const started = performance.now();
  try {
    const response = await fetch(url, options);
    const text = await response.text();
    const took = Math.round(performance.now() - started);
    const headers = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    output.textContent = `${response.status} in ${took} ms\n${headers}\n\n${shortened(text)}`;
  } catch (error) {
    output.textContent = String(error);
  }
}

function trial(method, path, operation) {
  const url = urlOf(path, operation);
  const asksKey = Boolean(operation.security);
  const body = element("textarea", { value: exampleOf(operation), spellcheck: false });
  const curl = element("pre", {});
  const output = element("pre", { textContent: "…" });
  const button = element("button", { textContent: "Send", type: "button" });
  const showCurl = () => {
    try { curl.textContent = curlOf(method, url, body.value, asksKey); } catch { curl.textContent = "the body is not JSON"; }
  };
  body.addEventListener("input", showCurl);
  button.addEventListener("click", () => send(method, url, body.value, output));
  showCurl();
  return [element("h3", { textContent: "Try it" }), ...(method === "get" ? [] : [body]), curl, button, output];
}

function answers(operation) {
  return Object.entries(operation.responses).map(([status, response]) => {
    const [media, content] = Object.entries(response.content)[0];
    const kind = media === "application/json" ? typeOf(content.schema) : media;
    return element("tr", {},
      element("td", { textContent: status }),
      element("td", { textContent: response.description }),
      element("td", {}, element("code", { textContent: kind })));
  });
}

function operationOf(path, method, operation) {
  const content = operation.requestBody && operation.requestBody.content["application/json"];
  const inside = element("div", {});
  const body = content && fields(content.schema);
  if (body) inside.append(element("h3", { textContent: "Body" }), body);
  inside.append(element("h3", { textContent: "Answers" }), element("table", {}, ...answers(operation)));
  inside.append(...trial(method, path, operation));
  const summary = element("summary", {},
    element("span", { className: "method", textContent: method.toUpperCase() }),
    element("code", { textContent: path }), " ",
    element("span", { className: "muted", textContent: operation.summary }));
  return element("details", { className: "operation" }, summary, inside);
}

async function show() {
  const response = await fetch("openapi.json");
  const api = await response.json();
  components = api.components.schemas;
  document.getElementById("description").textContent = api.info.description;
  const main = document.getElementById("operations");
  main.replaceChildren();
  for (const { name } of api.tags) {
    main.append(element("h2", { textContent: name }));
    for (const [path, methods] of Object.entries(api.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        if (operation.tags.includes(name)) main.append(operationOf(path, method, operation));
      }
    }
  }
}

show();
