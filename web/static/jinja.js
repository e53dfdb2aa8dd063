// Renders a chat template as slm.core.template_worker does. @huggingface/jinja parses and evaluates templates; this module
// evaluates like Python what that library evaluates like JavaScript. What it cannot evaluate is an error, never another text.
import { Float, SPACE, compareText, dumps, stripEnd, stripStart } from "./json.js";
import { Problem } from "./problem.js";
import { Environment, Interpreter, parse, tokenize } from "./vendor/jinja.mjs";

const MOST_CHARACTERS = 4 << 20;
const MOST_ITEMS = 1 << 20;
const LONGEST_TEMPLATE = 64 << 10;
// Some seconds. A template is a program that comes with the model.
const MOST_STEPS = 500_000;
const HINT = "the chat template is part of the model; the model can still continue text";

// The library exports no classes of values.
const sample = new Environment();
const kindOf = (name, value) => sample.set(name, value).constructor;
const Whole = kindOf("whole", 1);
const Fraction = kindOf("fraction", 1.5);
const Str = kindOf("string", "");
const Bool = kindOf("bool", true);
const Null = kindOf("null", null);
const List = kindOf("list", []);
const Dict = kindOf("dict", {});
const Func = kindOf("func", () => null);
const Missing = kindOf("missing", undefined);

const isNumber = (value) => value instanceof Whole || value instanceof Fraction || value instanceof Bool;
Environment.TESTS.set("number", isNumber);
Environment.TESTS.set("iterable", (value) => value instanceof List || value instanceof Str || value instanceof Dict);
Environment.TESTS.set("sequence", (value) => value instanceof List || value instanceof Str || value instanceof Dict);
Environment.TESTS.set("float", (value) => value instanceof Fraction);
for (const name of ["eq", "equalto"]) Environment.TESTS.delete(name); // tests get no arguments from the library

const STATEMENTS = new Set(["Set", "If", "For", "Macro", "CallStatement", "FilterStatement", "Comment", "Break", "Continue"]);
const WORDS = new RegExp(`((?:[-({[<]|${SPACE})+)`);
// Methods and filters of texts whose results differ from Python's.
const NOT_OF_TEXTS = new Set(["title", "int", "float", "indent"]);
const OF_DICTS = new Set(["clear", "copy", "fromkeys", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"]);
// Filters that take any value as text.
const OF_TEXTS = new Set(["upper", "lower", "capitalize", "title", "replace"]);
const PUT = {
  strip: (text, characters) => putStart(putEnd(text, characters), characters),
  lstrip: (text, characters) => putStart(text, characters),
  rstrip: (text, characters) => putEnd(text, characters),
};

function putStart(text, characters) {
  if (characters === null) return stripStart(text);
  const all = Array.from(text);
  const start = all.findIndex((each) => !characters.includes(each));
  return start < 0 ? "" : all.slice(start).join("");
}

function putEnd(text, characters) {
  if (characters === null) return stripEnd(text);
  const all = Array.from(text);
  const end = all.findLastIndex((each) => !characters.includes(each));
  return all.slice(0, end + 1).join("");
}

// Ends or continues a loop; carries the text of the iteration so far.
class LoopControl extends Error {
  constructor(kind) {
    super(kind);
    this.kind = kind;
    this.text = "";
  }
}

// Returns a value of JSON (see json.js) as a value of a template.
function given(value) {
  if (value === undefined) return new Missing();
  if (value === null) return new Null();
  if (typeof value === "string") return new Str(value);
  if (typeof value === "boolean") return new Bool(value);
  if (value instanceof Float) return new Fraction(value.value);
  if (typeof value === "number" || typeof value === "bigint") return new Whole(value);
  if (Array.isArray(value)) return new List(value.map(given));
  return new Dict(new Map([...value].map(([key, each]) => [key, given(each)])));
}

// Returns a value of a template as a value of JSON.
function plain(value) {
  if (value instanceof Null) return null;
  if (value instanceof Fraction) return new Float(value.value);
  if (value instanceof List) return value.value.map(plain);
  if (value instanceof Dict) return new Map([...value.value].map(([key, each]) => [key, plain(each)]));
  if (value instanceof Str || value instanceof Bool || value instanceof Whole) return value.value;
  throw new Error("a value without JSON");
}

// Returns the text of a value, as Python's str does.
function text(value) {
  if (value instanceof Str) return value.value;
  if (value instanceof Missing) return "";
  if (value instanceof Null) return "None";
  if (value instanceof Bool) return value.value ? "True" : "False";
  if (value instanceof Fraction) return String(new Float(value.value));
  if (value instanceof Whole) return String(value.value);
  return repr(value);
}

// Returns a value as Python's repr writes it.
function repr(value) {
  if (value instanceof Str) return quoted(value.value);
  if (value instanceof List) return `[${value.value.map(repr).join(", ")}]`;
  if (value instanceof Dict) return `{${[...value.value].map(([key, each]) => `${quoted(key)}: ${repr(each)}`).join(", ")}}`;
  if (isNumber(value) || value instanceof Null) return text(value);
  throw new Error("a function as text");
}

function quoted(value) {
  const mark = value.includes("'") && !value.includes('"') ? '"' : "'";
  const written = value.replace(/[\\\p{C}\p{Z}'"]/gu, (each) => {
    if (each === " " || each === (mark === "'" ? '"' : "'")) return each;
    if (each === mark || each === "\\") return `\\${each}`;
    const short = { "\n": "\\n", "\r": "\\r", "\t": "\\t" }[each];
    const code = each.codePointAt(0);
    const hex = (digits) => code.toString(16).padStart(digits, "0");
    return short ?? (code < 0x100 ? `\\x${hex(2)}` : code < 0x10000 ? `\\u${hex(4)}` : `\\U${hex(8)}`);
  });
  return mark + written + mark;
}

function equal(a, b) {
  if (isNumber(a) && isNumber(b)) return Number(a.value) === Number(b.value);
  if (a instanceof Str || b instanceof Str) return a instanceof Str && b instanceof Str && a.value === b.value;
  if (a instanceof List && b instanceof List) return a.value.length === b.value.length && a.value.every((each, i) => equal(each, b.value[i]));
  if (a instanceof Dict && b instanceof Dict) {
    return a.value.size === b.value.size && [...a.value].every(([key, each]) => b.value.has(key) && equal(each, b.value.get(key)));
  }
  return (a instanceof Null && b instanceof Null) || (a instanceof Missing && b instanceof Missing) || a === b;
}

class Python extends Interpreter {
  #steps = 0;

  evaluateBlock(statements, environment) {
    let result = "";
    for (const statement of statements) {
      try {
        const value = this.evaluate(statement, environment);
        if (STATEMENTS.has(statement.type)) result += value instanceof Str ? value.value : "";
        else result += text(value);
      } catch (error) {
        if (error instanceof LoopControl) error.text = result + error.text;
        throw error;
      }
      if (result.length > 2 * MOST_CHARACTERS) throw new Error("it needs too much memory");
    }
    return new Str(result);
  }

  evaluate(statement, environment) {
    if (statement?.type === "Break" || statement?.type === "Continue") throw new LoopControl(statement.type);
    if (++this.#steps > MOST_STEPS) throw new Error("it takes too long");
    const value = super.evaluate(statement, environment);
    const most = value instanceof Str ? 2 * MOST_CHARACTERS : value instanceof List ? MOST_ITEMS : Infinity;
    if (value?.value?.length > most) throw new Error("it needs too much memory");
    return value;
  }

  evaluateBinaryExpression(node, environment) {
    const operator = node.operator.value;
    if (operator === "and" || operator === "or") return super.evaluateBinaryExpression(node, environment);
    const left = this.evaluate(node.left, environment);
    const right = this.evaluate(node.right, environment);
    if (operator === "==") return new Bool(equal(left, right));
    if (operator === "!=") return new Bool(!equal(left, right));
    if (operator === "~") return new Str(text(left) + text(right));
    if (operator === "in" || operator === "not in") return new Bool(within(left, right) === (operator === "in"));
    if (left instanceof Str && right instanceof Str) {
      if (operator === "+") return new Str(left.value + right.value);
      const order = compareText(left.value, right.value);
      const orders = { "<": order < 0, ">": order > 0, "<=": order <= 0, ">=": order >= 0 };
      if (operator in orders) return new Bool(orders[operator]);
    }
    if (left instanceof List && right instanceof List && operator === "+") return new List([...left.value, ...right.value]);
    if (isNumber(left) && isNumber(right)) return calculated(operator, left, right);
    throw new Error(`${operator} with values of these types`);
  }

  applyFilter(operand, node, environment) {
    const name = node.type === "CallExpression" ? node.callee.value : node.value;
    const [list, named] = node.type === "CallExpression" ? this.evaluateArguments(node.args, environment) : [[], new Map()];
    if (name === "tojson") return json(operand, list, named);
    if (name === "string") return new Str(text(operand));
    if (name === "trim" && list.length + named.size === 0) return new Str(PUT.strip(text(operand), null));
    if (name === "join" && operand instanceof List && !named.has("attribute")) {
      return new Str(operand.value.map(text).join(text(list[0] ?? named.get("d") ?? new Str(""))));
    }
    if (name === "default" || name === "d") {
      const [other, loose] = [list[0] ?? named.get("default_value") ?? new Str(""), list[1] ?? named.get("boolean")];
      return operand instanceof Missing || (loose?.value && !operand.__bool__().value) ? other : operand;
    }
    if (operand instanceof Missing && (name === "length" || name === "list")) {
      return name === "length" ? new Whole(0) : new List([]);
    }
    if ((name === "first" || name === "last") && operand instanceof List && !operand.value.length) return new Missing();
    if (OF_TEXTS.has(name) && !(operand instanceof Str)) return this.applyFilter(new Str(text(operand)), node, environment);
    if (operand instanceof Str) {
      if (name === "length" || name === "count") return new Whole(Array.from(operand.value).length);
      if (name === "capitalize") return new Str(capitalized(operand.value));
      if (name === "title") return new Str(operand.value.split(WORDS).map(capitalized).join(""));
      if (name === "list") return new List(Array.from(operand.value, (each) => new Str(each)));
      if (NOT_OF_TEXTS.has(name)) throw new Error(`the filter ${name}`);
    }
    return super.applyFilter(operand, node, environment);
  }

  evaluateMemberExpression(node, environment) {
    const object = this.evaluate(node.object, environment);
    if (object instanceof Missing) throw new Error("a field of an undefined value");
    if (node.computed && node.property.type === "SliceExpression") return this.evaluateSliceExpression(object, node.property, environment);
    const key = node.computed ? this.evaluate(node.property, environment) : new Str(node.property.value);
    if (key instanceof Whole && (object instanceof List || object instanceof Str)) {
      const items = object instanceof List ? object.value : Array.from(object.value, (each) => new Str(each));
      return items.at(Number(key.value)) ?? new Missing();
    }
    if (!(key instanceof Str)) return new Missing();
    return (object instanceof Str ? methodOf(object.value, key.value) : fieldOf(object, key.value, node.computed)) ?? object.builtins.get(key.value) ?? new Missing();
  }

  // Variables that are set in an iteration end with it, and what is written before a break stays.
  evaluateFor(node, environment) {
    const filtered = node.iterable.type === "SelectExpression";
    const over = this.evaluate(filtered ? node.iterable.lhs : node.iterable, environment);
    let items = [];
    if (over instanceof List) items = over.value;
    else if (over instanceof Dict) items = [...over.value.keys()].map((key) => new Str(key));
    else if (over instanceof Str) items = Array.from(over.value, (each) => new Str(each));
    else if (!(over instanceof Missing)) throw new Error("a loop over a value that is no list");
    const scope = (item) => {
      const made = new Environment(environment);
      const names = node.loopvar.type === "TupleLiteral" ? node.loopvar.value : null;
      if (names === null) made.setVariable(node.loopvar.value, item);
      else {
        if (!(item instanceof List) || item.value.length !== names.length) throw new Error("a loop over values of other lengths");
        names.forEach((name, i) => made.setVariable(name.value, item.value[i]));
      }
      return made;
    };
    if (filtered) items = items.filter((item) => this.evaluate(node.iterable.test, scope(item)).__bool__().value);
    if (!items.length) return this.evaluateBlock(node.defaultBlock ?? [], new Environment(environment));
    let result = "";
    for (const [i, item] of items.entries()) {
      const within_ = scope(item);
      within_.setVariable("loop", new Dict(loopFields(items, i)));
      try {
        result += this.evaluateBlock(node.body, within_).value;
      } catch (error) {
        if (!(error instanceof LoopControl)) throw error;
        result += error.text;
        if (error.kind === "Break") break;
      }
    }
    return new Str(result);
  }

  // A macro sees the variables where it is defined, not those where it is called.
  evaluateMacro(node, environment) {
    super.evaluateMacro(node, environment);
    const macro = environment.lookupVariable(node.name.value);
    environment.setVariable(node.name.value, new Func((args, scope) => macro.value(args, scope?.variables.has("caller") ? scope : environment)));
    return new Null();
  }
}

// Returns a method of a text; undefined for those that the library has.
function methodOf(value, name) {
  if (Object.hasOwn(PUT, name)) return new Func(([characters]) => new Str(PUT[name](value, characters ? characters.value : null)));
  if (name === "capitalize") return new Func(() => new Str(capitalized(value)));
  if (name === "join") return new Func(([parts]) => new Str(parts.value.map(textOnly).join(value)));
  if (NOT_OF_TEXTS.has(name)) throw new Error(`the method ${name}`);
  return name === "length" ? new Missing() : undefined;
}

// Returns a field of an object or a namespace; undefined if there is none. x.items is the method, x["items"] the field.
function fieldOf(object, name, computed) {
  if (object instanceof List) return new Missing();
  if (!(object.value instanceof Map)) return undefined;
  if (!computed && object instanceof Dict && OF_DICTS.has(name)) {
    if (!object.builtins.has(name)) throw new Error(`the method ${name}`);
    return object.builtins.get(name);
  }
  return object.value.get(name) ?? (OF_DICTS.has(name) ? undefined : new Missing());
}

function calculated(operator, left, right) {
  const [a, b] = [left.value, right.value].map((value) => (typeof value === "boolean" ? Number(value) : value));
  if (typeof a === "bigint" || typeof b === "bigint") throw new Error("arithmetic with numbers of this size");
  const order = { "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b }[operator];
  if (order !== undefined) return new Bool(order);
  if (["/", "//", "%"].includes(operator) && b === 0) throw new Error("division by zero");
  const found = { "+": a + b, "-": a - b, "*": a * b, "/": a / b, "//": Math.floor(a / b), "%": a - b * Math.floor(a / b), "**": a ** b }[operator];
  if (found === undefined || !Number.isFinite(found)) throw new Error(`${operator} with these numbers`);
  const fraction = operator === "/" || left instanceof Fraction || right instanceof Fraction || (operator === "**" && b < 0);
  return fraction ? new Fraction(found) : new Whole(found);
}

// The library's values are slow to make, so that loops share theirs.
const wholes = [];
const whole = (value) => (wholes[value] ??= new Whole(value));
const [YES, NO, MISSING] = [new Bool(true), new Bool(false), new Missing()];

const loopFields = (items, i) =>
  new Map([
    ["index", whole(i + 1)],
    ["index0", whole(i)],
    ["revindex", whole(items.length - i)],
    ["revindex0", whole(items.length - i - 1)],
    ["first", i === 0 ? YES : NO],
    ["last", i === items.length - 1 ? YES : NO],
    ["length", whole(items.length)],
    ["previtem", items[i - 1] ?? MISSING],
    ["nextitem", items[i + 1] ?? MISSING],
  ]);

const capitalized = (value) => {
  const [first = "", ...rest] = Array.from(value);
  return first.toUpperCase() + rest.join("").toLowerCase();
};

function textOnly(value) {
  if (value instanceof Str) return value.value;
  throw new Error("join of values that are no texts");
}

function within(left, right) {
  if (right instanceof List) return right.value.some((each) => equal(left, each));
  if (right instanceof Missing) return false;
  if (right instanceof Str && left instanceof Str) return right.value.includes(left.value);
  if (right instanceof Dict) return left instanceof Str && right.value.has(left.value);
  throw new Error("in with values of these types");
}

function json(operand, list, named) {
  const argument = (name, place) => plain(list[place] ?? named.get(name) ?? new Null());
  const [ascii, indent, separators, sortKeys] = ["ensure_ascii", "indent", "separators", "sort_keys"].map(argument);
  if (indent !== null && typeof indent !== "number") throw new Error("tojson with this indent");
  return new Str(dumps(plain(operand), { ascii: ascii ?? false, indent, separators, sortKeys: sortKeys ?? false }));
}

// strftime of Python's for local time.
const DATE = {
  Y: (now) => String(now.getFullYear()),
  m: (now) => two(now.getMonth() + 1),
  d: (now) => two(now.getDate()),
  H: (now) => two(now.getHours()),
  M: (now) => two(now.getMinutes()),
  S: (now) => two(now.getSeconds()),
  b: (now) => MONTHS[now.getMonth()].slice(0, 3),
  B: (now) => MONTHS[now.getMonth()],
  a: (now) => DAYS[now.getDay()].slice(0, 3),
  A: (now) => DAYS[now.getDay()],
  "%": () => "%",
};
const two = (value) => String(value).padStart(2, "0");
const DAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS = [
  ...["January", "February", "March", "April", "May", "June"],
  ...["July", "August", "September", "October", "November", "December"],
];

function dateText(format, now) {
  return format.replace(/%(.)/gs, (whole, letter) => {
    if (!Object.hasOwn(DATE, letter)) throw new Error(`strftime_now with ${whole}`);
    return DATE[letter](now);
  });
}

// Returns a function that renders conversations with a template: (variables, now) to text. variables: values of JSON by name.
export function compiled(template) {
  if (template.length > LONGEST_TEMPLATE) throw new Problem("the chat template is too long", HINT);
  let program;
  try {
    program = parse(tokenize(template, { lstrip_blocks: true, trim_blocks: true }));
  } catch (error) {
    throw failed(error);
  }
  return (variables, now = new Date()) => {
    const globals = new Environment();
    const constants = { true: true, True: true, false: false, False: false, none: null, None: null };
    for (const [name, value] of Object.entries(constants)) globals.setVariable(name, given(value));
    globals.setVariable("raise_exception", new Func(([message]) => {
      throw new Refusal(message ? text(message) : "");
    }));
    globals.setVariable("strftime_now", new Func(([format]) => new Str(dateText(text(format), now))));
    globals.setVariable("range", new Func((args) => new List(range(...args.map(({ value }) => Number(value))).map(whole))));
    for (const [name, value] of Object.entries(variables)) globals.setVariable(name, given(value));
    try {
      const found = new Python(globals).run(program).value;
      if (Array.from(found).length > MOST_CHARACTERS) throw new Error("the rendered text is too long");
      return found;
    } catch (error) {
      throw failed(error);
    }
  };
}

// What a template says that rejects a conversation.
class Refusal extends Error {}

function failed(error) {
  const reason = String(error?.message ?? error).split(/\s+/).join(" ").slice(0, 200);
  if (error instanceof Refusal) return new Problem(`the chat template rejects the conversation: ${reason}`, HINT);
  return new Problem(`the page cannot render the model's chat template: ${reason}`, HINT);
}

function range(first, last, step = 1) {
  const [start, stop] = last === undefined ? [0, first] : [first, last];
  if (!step || Math.abs((stop - start) / step) > 100_000) throw new Error("a range of this size");
  const found = [];
  for (let at = start; step > 0 ? at < stop : at > stop; at += step) found.push(at);
  return found;
}

